"""Two decode replicas and the gateway's part between them: an answer that one begins and the other ends is the one that
a single replica gives, token for token and character for character."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY_VOCAB, tiny_llama
from null_observer import NullObserver
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from shoal.api.backend import Readiness, Route
from shoal.api.retrying import RetryingBackend
from shoal.cluster.local import LocalShoal, open_local
from shoal.config import RateConfig, load_config
from shoal.config.rate import RateLimit
from shoal.engine.engine import Engine
from shoal.engine.events import StepOutput
from shoal.errors import PeerGone, PlanMismatch
from shoal.wire.messages import (  # fmt: skip
    Depth,
    FinishReason,
    GenerateRequest,
    PromptOutline,
    RequestContext,
    Resumption,
    SamplingParams,
    SentChoice,
    TokenOutput,
)
from shoal.wire.requests import from_submit, to_submit

PROMPT = (5, 17, 40, 3, 88, 22, 9, 61, 30, 12, 77, 45, 6, 19, 52, 33, 71, 28, 90, 14, 66, 8, 41, 25)
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=1.5, seed=3)
MODEL: dict[str, Any] = {"skip_layers": 3, "dtype": "float32"}

Models = tuple[LocalShoal, LocalShoal]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are bytes, many of them of characters that have several."""
    folder = tmp_path_factory.mktemp("bytes")
    _, model = tiny_llama(torch.float32)
    model.save_pretrained(folder)
    spelling = bytes_to_unicode()
    parts = [bytes([byte]) for byte in (*b"abcdefghijklmnopqrstuvwxyz ,.", *range(0x80, 0xC0))]
    parts += [b"\xc3", b"\xe4"]
    names = [*TINY_VOCAB[:2], *("".join(spelling[byte] for byte in part) for part in parts)]
    tokenizer = Tokenizer(BPE(vocab={name: index for index, name in enumerate(names[:97])}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names[:2]])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=names[0], eos_token=names[1]).save_pretrained(folder)
    return folder


@asynccontextmanager
async def pair(folder: Path, other: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[Models]:
    """Two decode replicas, each with its prefill replica, that hold nothing in the end; ``other`` is of the second."""
    stage = {"num_blocks": 64, "block_tokens": 4, "max_step_tokens": 16, "num_threads": 1}
    decode = stage | options.pop("decode", {})
    model = {"name": str(folder)} | options.pop("model", MODEL)
    async with AsyncExitStack() as exits:
        both = [
            await exits.enter_async_context(
                open_local(load_config(model=model | more, prefill=stage, decode=decode, **options))
            )
            for more in ({}, other or {})
        ]
        yield both[0], both[1]
        for local in both:
            await local.decode.desk.idle.wait()
            if not local.decode.engine.is_serving:
                continue
            counts = await local.decode.counts()
            assert (counts.num_waiting, counts.num_reserved, counts.num_running) == (0, 0, 0)
            assert counts.num_free_blocks == counts.num_blocks


class Pool:
    """The first run is ``dying``'s, and ends after ``num_before`` outputs; ``other``'s is the next."""

    def __init__(self, dying: LocalShoal, other: LocalShoal, num_before: int) -> None:
        self.requests: list[GenerateRequest] = []
        self._dying, self._other = dying, other
        self._num_before = num_before

    async def living(self) -> frozenset[str]:
        return frozenset({"dying", "other"})

    async def generate(self, request: GenerateRequest, _route: Route) -> AsyncGenerator[TokenOutput, None]:
        self.requests.append(request)
        is_dying = len(self.requests) == 1
        replica = self._dying if is_dying else self._other
        num_left = self._num_before if is_dying else -1
        arrived = from_submit(to_submit(b"g" * 16, 7, b"s" * 16, request))
        async with aclosing(replica.decode.worker.generate(arrived)) as outputs:
            async for output in outputs:
                if not num_left:
                    raise PeerGone("died")
                num_left -= 1
                yield output

    async def readiness(self) -> Readiness:
        return Readiness(num_decode=2, num_prefill=2)


class DeadEngines(Pool):
    """Each run goes to the first replica that it doesn't exclude, and ends as that one says."""

    async def generate(self, request: GenerateRequest, route: Route) -> AsyncGenerator[TokenOutput, None]:
        self.requests.append(request)
        is_dying = "dying" not in route.excluded
        route.replica_id = "dying" if is_dying else "other"
        replica = self._dying if is_dying else self._other
        async with aclosing(replica.decode.worker.generate(request)) as outputs:
            async for output in outputs:
                yield output


async def let_die(local: LocalShoal, num_tokens: int) -> None:
    """Decode's engine thread ends in the step that would bring the token after ``num_tokens``."""

    def wrap(engine: Engine) -> None:
        step, num_left = engine.step, num_tokens

        def dying_step() -> StepOutput:
            nonlocal num_left
            output = step()
            num_left -= len(output.tokens)
            if num_left < 0:
                raise RuntimeError("a defect of the scheduler")
            return output

        engine.step = dying_step  # type: ignore[method-assign]

    await local.decode.engine.call(wrap)


def request(sampling: SamplingParams, depth: Depth = Depth.SHALLOW) -> GenerateRequest:
    outline = PromptOutline(num_system_tokens=9, num_header_tokens=3)
    return GenerateRequest(RequestContext("test", 30.0), "tiny", PROMPT, depth, sampling, outline=outline)


async def whole(local: LocalShoal, asked: GenerateRequest) -> list[TokenOutput]:
    return [output async for output in local.decode.worker.generate(asked)]


async def cut(models: Models, asked: GenerateRequest, num_before: int) -> list[TokenOutput]:
    """The answer of which the first replica gave ``num_before`` outputs."""
    pool = Pool(*models, num_before)
    backend = RetryingBackend(pool, max_attempts=3, limit=RateLimit(RateConfig()), observer=NullObserver())
    outputs = [output async for output in backend.generate(asked)]
    assert len(pool.requests) == 2
    return outputs


def of_choices(outputs: Sequence[TokenOutput], asked: GenerateRequest) -> list[list[tuple[Any, ...]]]:
    """All that a client sees of each choice, but log-probabilities, which are the same to rounding only."""
    return [
        [(one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in outputs if one.choice == choice]
        for choice in range(asked.sampling.num_choices)
    ]


def counted(local: LocalShoal, name: str, **labels: str) -> float | None:
    return local.decode.registry.get_sample_value(name, labels)


PLANS: dict[str, dict[str, Any]] = {
    "pop": MODEL,
    "nothing skipped": MODEL | {"skip_layers": 0},
    "more at full depth": MODEL | {"boundary_tokens": 6},
    "speed": MODEL | {"plan": "speed", "anchors": "system", "deep_blocks_ratio": 1.0},
}


@pytest.mark.parametrize("plan", PLANS)
async def test_after_any_token_by_any_plan(folder: Path, plan: str):
    async with pair(folder, model=PLANS[plan]) as models:
        for sampling in (GREEDY, SEEDED):
            asked = request(sampling)
            expected = await whole(models[0], asked)
            assert expected[0].handoff is not None and expected[0].handoff.transferred
            for number in range(len(expected)):
                assert of_choices(await cut(models, asked, number), asked) == of_choices(expected, asked)


@pytest.mark.parametrize("num_tokens", [0, 4])
async def test_where_an_engine_dies_another_replica_goes_on(folder: Path, num_tokens: int):
    """With what it has begun, and with what comes to it later, as long as the gateway hasn't heard of it."""
    async with pair(folder) as models:
        asked = request(SEEDED)
        expected = of_choices(await whole(models[1], asked), asked)
        await let_die(models[0], num_tokens)
        for _ in range(2):
            pool = DeadEngines(*models, 0)
            backend = RetryingBackend(pool, max_attempts=3, limit=RateLimit(RateConfig()), observer=NullObserver())
            outputs = [output async for output in backend.generate(asked)]
            assert of_choices(outputs, asked) == expected
            resumptions = [one.resumption for one in pool.requests]
            num_sent = [0 if one is None else len(one.choices[0].token_ids) for one in resumptions]
            assert num_sent == [0, num_tokens]
            assert not models[0].decode.engine.is_serving
            num_tokens = 0


@pytest.mark.parametrize("sampling", [GREEDY, replace(SEEDED, num_choices=3)], ids=["one", "several"])
async def test_where_some_steps_tokens_leave_together(folder: Path, sampling: SamplingParams):
    """After any output; how many tokens each of them has is the event loop's doing."""

    def said(outputs: Sequence[TokenOutput]) -> list[tuple[Any, ...]]:
        choices = of_choices(outputs, asked)
        return [(sum((one[0] for one in each), ()), "".join(one[1] for one in each), each[-1][2:]) for each in choices]

    async with pair(folder, decode={"stream_interval": 3}) as models:
        asked = request(sampling)
        expected = said(await whole(models[0], asked))
        for number in range(4):
            assert said(await cut(models, asked, number)) == expected


async def test_at_full_depth(folder: Path):
    async with pair(folder) as models:
        asked = request(SEEDED, Depth.FULL)
        expected = await whole(models[0], asked)
        assert of_choices(await cut(models, asked, 4), asked) == of_choices(expected, asked)


async def test_several_choices_of_which_some_are_complete(folder: Path):
    """One ends by a stop token, after some of the outputs; whatever was given of each, the others go on."""
    async with pair(folder) as models:
        plain = request(replace(SEEDED, num_choices=3))
        early = of_choices(await whole(models[0], plain), plain)[1][3][0]
        asked = replace(plain, sampling=replace(plain.sampling, stop_token_ids=early))
        expected = await whole(models[0], asked)
        lengths = [len(choice) for choice in of_choices(expected, asked)]
        assert len(set(lengths)) > 1
        for number in range(len(expected)):
            assert of_choices(await cut(models, asked, number), asked) == of_choices(expected, asked)


async def test_what_was_held_back_comes_out_once(folder: Path):
    """Bytes of a character that isn't whole, and the beginning of a stop string."""
    async with pair(folder) as models:
        free = [(one.token_ids[0], one.text) for one in await whole(models[0], request(replace(SEEDED, max_tokens=40)))]
        text = "".join(piece for _, piece in free)
        # One that ends the answer, and another that its beginning only looks like.
        stops = (text[20:23], text[4:6] + "\0")
        for options in ({}, {"stop": stops}, {"stop": stops, "min_tokens": 25}):
            asked = request(replace(SEEDED, max_tokens=40, **options))  # type: ignore[arg-type]
            expected = await whole(models[0], asked)
            held = [number for number, one in enumerate(expected, 1) if not one.text and one.finish_reason is None]
            assert held, "nothing is held back: nothing is tested"
            for number in held[::3]:
                assert of_choices(await cut(models, asked, number), asked) == of_choices(expected, asked)


async def test_an_answer_ends_where_it_would_have(folder: Path):
    """By an end token, which ``min_tokens`` put off, counting those that were sent."""
    async with pair(folder) as models:
        plain = [
            request(replace(GREEDY, temperature=5.0, seed=seed, max_tokens=60, ignore_eos=False)) for seed in range(20)
        ]
        ended = [(one, outputs) for one in plain if 3 < len(outputs := await whole(models[0], one)) < 60]
        assert ended, "no answer ended by itself: nothing is tested"
        asked, outputs = ended[0]
        longer = replace(asked, sampling=replace(asked.sampling, min_tokens=len(outputs) + 1))
        for one in (asked, longer):
            expected = await whole(models[0], one)
            for number in (1, len(expected) - 1):
                assert of_choices(await cut(models, one, number), one) == of_choices(expected, one)


async def test_log_probabilities_go_on_and_are_told_once_of_the_prompt(folder: Path):
    async with pair(folder) as models:
        asked = request(replace(SEEDED, num_logprobs=2, num_prompt_logprobs=1), Depth.FULL)
        expected = await whole(models[0], asked)
        resumed = await cut(models, asked, 4)
    assert [len(one.prompt_logprobs) for one in resumed] == [len(PROMPT) - 1, *[0] * 9]
    for ours, theirs in zip(resumed, expected, strict=True):
        [mine], [its] = ours.logprobs, theirs.logprobs
        assert mine.token_id == its.token_id and mine.logprob == pytest.approx(its.logprob, abs=1e-4)
        assert [one[:2] for one in mine.top] == [one[:2] for one in its.top]


async def test_choices_without_a_token_end_once(folder: Path):
    """Where only the prompt is asked about."""
    async with pair(folder) as models:
        asked = request(replace(SEEDED, max_tokens=0, num_choices=3, num_prompt_logprobs=1), Depth.FULL)
        expected = await whole(models[0], asked)
        for number in range(len(expected)):
            assert of_choices(await cut(models, asked, number), asked) == of_choices(expected, asked)


async def test_the_first_token_is_told_of_once(folder: Path):
    async with pair(folder) as models:
        outputs = await cut(models, request(GREEDY), 4)
        assert [one.handoff is not None for one in outputs] == [True, *[False] * 9]
        assert [one.stages is not None for one in outputs] == [True, *[False] * 9]
        # The prompt was handed over again, and only what was missing is new.
        assert counted(models[1], "shoal_kv_transfer_seconds_count", transport="memory") == 1
        assert counted(models[1], "shoal_decode_tokens_total") == 6


async def test_where_the_answer_is_remembered_only_its_rest_is_computed(folder: Path):
    """The other replica has given the same answer to somebody else."""
    async with pair(folder, decode={"reuse": "exact"}) as models:
        asked = request(GREEDY)
        expected = await whole(models[1], asked)
        assert of_choices(await cut(models, asked, 6), asked) == of_choices(expected, asked)
        # Of the answer nothing counts.
        assert counted(models[1], "shoal_prefix_cache_hits_total") == len(PROMPT)
        assert counted(models[1], "shoal_prefill_tokens_total", source="cached") == len(PROMPT)
        assert counted(models[1], "shoal_kv_transfer_seconds_count", transport="memory") == 1


async def test_a_replica_of_another_plan_does_not_go_on(folder: Path):
    async with pair(folder, other={"skip_layers": 2}) as models:
        first = await whole(models[0], request(GREEDY))
        with pytest.raises(PlanMismatch, match="ask again"):
            await cut(models, request(GREEDY), 4)
        # The gateway's request as it would send it: the plan's hash is what the first output told.
        assert first[0].handoff is not None
        resumption = Resumption(first[0].handoff.plan_hash, (SentChoice(first[0].token_ids),))
        with pytest.raises(PlanMismatch):
            await whole(models[1], replace(request(GREEDY), resumption=resumption))
        assert len(await whole(models[0], replace(request(GREEDY), resumption=resumption))) == 9
    assert first[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("plan", "other"),
    [
        ("pop", {"boundary_tokens": 6}),
        ("more at full depth", {"boundary_tokens": 7}),
        ("speed", {"anchors": "bos"}),
        ("speed", {"boundary_tokens": 6}),
    ],
)
async def test_a_replica_that_computes_other_tokens_itself_does_not_go_on(
    folder: Path, plan: str, other: dict[str, Any]
):
    """Though either takes what the other one's prefill ships."""
    async with pair(folder, model=PLANS[plan], other=other) as models:
        assert models[0].decode.served.plan_hash == models[1].decode.served.plan_hash
        for begins, goes_on in (models, models[::-1]):
            with pytest.raises(PlanMismatch, match="ask again"):
                await cut((begins, goes_on), request(GREEDY), 4)
            asked = request(GREEDY, Depth.FULL)  # of which it makes no difference who computes what
            assert of_choices(await cut((begins, goes_on), asked, 4), asked) == of_choices(
                await whole(begins, asked), asked
            )
