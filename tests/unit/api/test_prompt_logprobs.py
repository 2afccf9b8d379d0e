"""What is told of prompts over both doors, with a tiny model in float64 behind them: as transformers computes it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import exact
from local_gateway import Served, serving
from models import BOS, save_tiny, tiny_llama

from shoal.api import answers
from shoal.api.logprobs import prompt_logprobs
from shoal.client import Depth, FinishReason

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
IDS = [BOS, 5, 17, 40, 3, 88, 22, 9, 61, 30, 12, 77, 45, 6, 19, 52]
TEXT = "the sea is wide"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return exact(save_tiny(folder, tiny_llama(torch.float64, layers=6)[1]))


@pytest.fixture
async def served(folder: Path, model: Any) -> AsyncIterator[Served]:
    async with serving(folder) as one:
        yield one


def log_softmax(model: Any, ids: list[int]) -> torch.Tensor:
    """``[tokens, vocab]``: row i is what follows token i."""
    with torch.no_grad():
        return torch.as_tensor(model(torch.tensor([ids])).logits[0].log_softmax(dim=-1))


def own(model: Any, ids: list[int]) -> list[float]:
    """The log-probability of each token but the first."""
    rows = log_softmax(model, ids)
    return [float(rows[at, token_id]) for at, token_id in enumerate(ids[1:])]


def score_as_lm_eval(answer: Any, num_context: list[int]) -> list[tuple[float, bool]]:
    """How lm-evaluation-harness reads an answer: the log-likelihood of what follows each context, and whether all of
    its tokens are the likeliest. The last token is the one generated."""
    scores = []
    for choice, start in zip(sorted(answer["choices"], key=lambda one: one["index"]), num_context, strict=True):
        told = choice["logprobs"]
        tokens, tops = told["token_logprobs"][start:-1], told["top_logprobs"][start:-1]
        pairs = zip(tokens, tops, strict=True)
        scores.append((sum(tokens), all(logprob == max(top.values()) for logprob, top in pairs)))
    return scores


async def test_lm_evals_log_likelihoods_are_the_full_models(served: Served, model: Any) -> None:
    greedy = IDS[:6]
    while len(greedy) < 10:
        greedy.append(int(log_softmax(model, greedy)[-1].argmax()))
    prompts, num_context = [IDS, greedy, IDS[:9]], [4, 6, 1]
    answer = await served.post(prompt=prompts, echo=True, logprobs=1, max_tokens=1, seed=1234)
    found = score_as_lm_eval(answer, num_context)
    for prompt, start, (score, _) in zip(prompts, num_context, found, strict=True):
        assert score == pytest.approx(sum(own(model, prompt)[start - 1 :]), abs=1e-9)
    assert [is_greedy for _, is_greedy in found] == [False, True, False]
    assert answer["usage"]["depth"] == "full" and served.num_counted("echo") == 1
    assert [(one.depth, one.transferred, one.fallback) for one in served.pools.reports] == [
        (Depth.FULL, False, None)
    ] * 3


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
async def test_an_echoed_choice_has_the_prompts_tokens_and_its_own(
    served: Served, model: Any, n: int, max_tokens: int
) -> None:
    answer = await served.post(prompt=TEXT, echo=True, logprobs=2, max_tokens=max_tokens, n=n, ignore_eos=True)
    ids = list(await served.tokenizer.encode(TEXT))
    rows = log_softmax(model, ids)
    assert [choice["index"] for choice in answer["choices"]] == list(range(n))
    for choice in answer["choices"]:
        told = choice["logprobs"]
        assert choice["text"].startswith(TEXT) and choice["finish_reason"] == "length"
        assert {len(values) for values in told.values()} == {len(ids) + max_tokens}
        assert told["tokens"][: len(ids)] == list(TEXT)
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        assert told["token_logprobs"][1 : len(ids)] == pytest.approx(own(model, ids), abs=1e-9)
        for row, top in zip(rows, told["top_logprobs"][1 : len(ids)], strict=False):
            assert list(top.values())[:2] == pytest.approx(row.topk(2).values.tolist(), abs=1e-9)
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            assert choice["text"][offset:].startswith(token)
    assert answer["usage"]["completion_tokens"] == n * max_tokens


async def test_what_is_generated_is_what_full_depth_generates_without_echo(served: Served) -> None:
    plain = await served.post(prompt=IDS, max_tokens=8, depth="full")
    echoed = await served.post(prompt=IDS, max_tokens=8, echo=True)
    [without], [choice] = plain["choices"], echoed["choices"]
    assert choice["text"] == served.tokenizer.decode(IDS) + without["text"]
    assert choice["logprobs"] is None and echoed["usage"]["depth"] == "full"


async def test_choices_of_one_prompt_tell_of_it_what_was_made_once(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there may be would make as many times the memory."""
    made: list[object] = []

    def counting(prompt: Any) -> Any:
        made.append(prompt)
        return prompt_logprobs(prompt)

    monkeypatch.setattr(answers, "prompt_logprobs", counting)
    answer = await served.post(prompt=[IDS, IDS[:5]], prompt_logprobs=1, max_tokens=1, n=3)
    told = [choice["prompt_logprobs"] for choice in answer["choices"]]
    assert len(made) == 2 and told[:3] == told[:1] * 3 and told[3:] == told[3:4] * 3
    assert [len(one) for one in told[::3]] == [len(IDS), 5]


async def test_vllms_field_names_tokens_by_id(served: Served, model: Any) -> None:
    answer = await served.post(prompt=IDS, prompt_logprobs=2, max_tokens=0)
    [choice] = answer["choices"]
    assert choice["text"] == "" and choice["logprobs"] is None and answer["usage"]["depth"] == "full"
    first, *others = choice["prompt_logprobs"]
    assert first is None
    for row, token_id, entries in zip(log_softmax(model, IDS), IDS[1:], others, strict=False):
        best = row.topk(2).indices.tolist()
        assert list(entries)[:2] == [str(one) for one in best] and str(token_id) in entries
        assert entries[str(token_id)]["logprob"] == pytest.approx(float(row[token_id]), abs=1e-9)
        ranks = [entries[str(one)]["rank"] for one in best]
        assert ranks == [1, 2] and (token_id in best or entries[str(token_id)]["rank"] is None)
        assert entries[str(token_id)]["decoded_token"] == served.tokenizer.decode([token_id])
    assert served.num_counted("prompt_logprobs") == 1


async def test_a_chats_prompt_is_told_beside_its_choices(served: Served, model: Any) -> None:
    answer = await served.post(
        CHAT, messages=[{"role": "user", "content": "hi"}], prompt_logprobs=0, max_tokens=2, ignore_eos=True, n=2
    )
    ids = [BOS, *await served.tokenizer.encode("user:hi|assistant:")]
    told = [next(iter(entry.values()))["logprob"] for entry in answer["prompt_logprobs"][1:]]
    assert told == pytest.approx(own(model, ids), abs=1e-9)
    assert len(answer["choices"]) == 2 and answer["usage"]["depth"] == "full"


async def test_grpc_tells_the_same(served: Served, model: Any) -> None:
    answer = await served.grpc.generate(IDS, prompt_logprobs=3, max_tokens=2, n=2, temperature=0, ignore_eos=True)
    assert [one.token_id for one in answer.prompt_logprobs] == IDS[1:]
    assert [one.logprob for one in answer.prompt_logprobs] == pytest.approx(own(model, IDS), abs=1e-9)
    assert {len(one.top) for one in answer.prompt_logprobs} == {3}
    assert answer.usage.depth is Depth.FULL
    stream = served.grpc.stream(IDS, prompt_logprobs=3, max_tokens=2, temperature=0, ignore_eos=True)
    assert "".join([delta.text async for delta in stream]) == answer.text
    assert stream.prompt_logprobs == answer.prompt_logprobs
    assert served.num_counted("prompt_logprobs") == 2


async def test_grpc_echoes_and_can_do_without_an_answer(served: Served, model: Any) -> None:
    answer = await served.grpc.generate(TEXT, echo=True, logprobs=1, max_tokens=0)
    ids = list(await served.tokenizer.encode(TEXT))
    assert answer.text == TEXT and answer.choices[0].token_ids == ()
    assert answer.choices[0].finish_reason is FinishReason.LENGTH
    assert [one.logprob for one in answer.prompt_logprobs] == pytest.approx(own(model, ids), abs=1e-9)
    stream = served.grpc.stream(TEXT, echo=True, max_tokens=3, temperature=0)
    texts = [delta.text async for delta in stream]
    assert texts[0].startswith(TEXT) and stream.prompt_logprobs == ()
    assert served.num_counted("echo") == 2


async def test_a_one_token_prompt_has_nothing_to_tell(served: Served) -> None:
    [choice] = (await served.post(prompt=[5], echo=True, logprobs=1, max_tokens=0))["choices"]
    assert choice["logprobs"] == {
        "tokens": ["3"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]
    }  # fmt: skip
    assert (await served.grpc.generate([5], prompt_logprobs=1, max_tokens=0)).prompt_logprobs == ()


async def test_where_nothing_is_skipped_decode_still_computes_what_it_tells(folder: Path, model: Any) -> None:
    """A plan without shallow tokens hands its full-depth prompts off, but no prefill replica has an lm_head."""
    async with serving(folder, skip_layers=0) as served:
        scored = await served.post(prompt=IDS, echo=True, logprobs=1, max_tokens=0)
        echoed = await served.post(prompt=IDS, echo=True, max_tokens=1)
    told = scored["choices"][0]["logprobs"]["token_logprobs"][1:]
    assert told == pytest.approx(own(model, IDS), abs=1e-9)
    assert [report.transferred for report in served.pools.reports] == [False, True]
    assert scored["usage"]["depth"] == echoed["usage"]["depth"] == "full"
