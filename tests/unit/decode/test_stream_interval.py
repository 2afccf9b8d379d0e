"""Several steps' tokens in one output: the same answers in fewer outputs, and neither end of one waits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny
from reference import pop_generate

from shoal.cluster.local import LocalShoal, open_local
from shoal.config import load_config
from shoal.wire.messages import (  # fmt: skip
    Depth,
    FinishReason,
    GenerateRequest,
    RequestContext,
    Resumption,
    SamplingParams,
    SentChoice,
    TokenOutput,
)

PROMPT = tuple(3 + index * 7 % 90 for index in range(24))
SKIPPED, NUM_TOKENS = 3, 12


async def ask(local: LocalShoal, resumption: Resumption | None = None, **sampling: Any) -> list[TokenOutput]:
    params = SamplingParams(**{"max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True} | sampling)
    request = GenerateRequest(RequestContext("test", 30), "tiny", PROMPT, Depth.SHALLOW, params, resumption=resumption)
    outputs = [output async for output in local.decode.worker.generate(request)]
    await asyncio.wait_for(local.decode.desk.idle.wait(), 5)
    counts = await local.decode.counts()
    assert counts.num_free_blocks == counts.num_blocks
    return outputs


def of_choice(outputs: list[TokenOutput], choice: int) -> tuple[Any, ...]:
    ones = [output for output in outputs if output.choice == choice]
    return (
        [token_id for one in ones for token_id in one.token_ids],
        "".join(one.text for one in ones),
        [logprob for one in ones for logprob in one.logprobs],
        [(one.finish_reason, one.stop_reason) for one in ones if one.finish_reason is not None],
    )


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("shoal.engine.outbox.MAX_HELD_S", 3600.0)  # however slow this machine is
    model = save_tiny(tmp_path, dtype=torch.float32, layers=6)
    stage = {"num_blocks": 64, "block_tokens": 4, "max_step_tokens": 32, "num_threads": 1}

    def load(stream_interval: int) -> Any:
        return load_config(
            model={"name": str(tmp_path), "skip_layers": SKIPPED, "dtype": "float32"},
            prefill=stage,
            decode=stage | {"stream_interval": stream_interval},
        )

    load.model = model  # type: ignore[attr-defined]
    return load


async def test_an_answer_is_the_same_in_fewer_outputs(config: Any):
    async with open_local(config(4)) as local:
        outputs = await ask(local)
    # The first token by itself, at once; then up to four steps' each, more or less of them as the event loop comes.
    sizes = [len(output.token_ids) for output in outputs]
    assert sizes[0] == 1 and max(sizes) <= 4 and len(sizes) < NUM_TOKENS
    assert tuple(of_choice(outputs, 0)[0]) == pop_generate(config.model, list(PROMPT), NUM_TOKENS, SKIPPED).token_ids
    assert [output.finish_reason for output in outputs[-2:]] == [None, FinishReason.LENGTH]
    assert outputs[0].stages is not None and outputs[0].handoff is not None and outputs[0].handoff.transferred
    assert all(output.stages is None and output.handoff is None for output in outputs[1:])


async def test_the_first_token_of_an_answer_that_another_replica_began_comes_at_once(config: Any):
    async with open_local(config(9)) as local:
        whole = of_choice(await ask(local), 0)[0]
        resumption = Resumption(local.decode.served.plan_hash, (SentChoice(tuple(whole[:3])),))
        rest = await ask(local, resumption)
    assert of_choice(rest, 0)[0] == whole[3:]
    assert len(rest[0].token_ids) == 1 and len(rest) < len(whole[3:])


@pytest.mark.parametrize(
    "sampling", [{}, {"num_logprobs": 2}, {"num_choices": 3, "temperature": 1.0, "seed": 7, "num_logprobs": 0}]
)
async def test_whatever_is_asked_of_it(config: Any, sampling: dict[str, Any]):
    answers = []
    for stream_interval in (1, 3):
        async with open_local(config(stream_interval)) as local:
            answers.append(await ask(local, **sampling))
    by_steps, together = answers
    assert len(together) < len(by_steps)
    for choice in range(sampling.get("num_choices", 1)):
        assert of_choice(together, choice) == of_choice(by_steps, choice)


async def test_a_stop_string_ends_it_where_it_would_by_steps(config: Any):
    async with open_local(config(1)) as local:
        text = "".join(output.text for output in await ask(local, max_tokens=30))
        stop = text[len(text) // 2 :][:3]
        by_steps = await ask(local, max_tokens=30, stop=(stop,))
    async with open_local(config(8)) as local:
        together = await ask(local, max_tokens=30, stop=(stop,))
    assert of_choice(together, 0) == of_choice(by_steps, 0)
    assert of_choice(together, 0)[3] == [(FinishReason.STOP, stop)]
