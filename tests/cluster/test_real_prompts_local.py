"""The twenty real prompts in one process without a hand-off: unchunked, and preempted for half the blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from real_prompts import NUM_SKIPPED, NUM_TOKENS, RealPrompt, assert_same_tokens, references

from shoal.cluster.local import open_local
from shoal.config import load_config
from shoal.wire.messages import Depth, GenerateRequest, RequestContext, SamplingParams

# Its references take several processes.
pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(900)]

# All twenty together end with 700 blocks.
HALF_THE_LOAD_BLOCKS = 350


async def test_decode_alone_with_half_the_blocks_it_wants_changes_nothing(known: Mapping[str, RealPrompt]):
    config = load_config(
        model={"dtype": "float32", "skip_layers": NUM_SKIPPED, "projector": "paper"},
        decode={"max_step_tokens": 2048, "num_blocks": HALF_THE_LOAD_BLOCKS},
        handoff={"min_tokens": 1 << 20},
    )
    async with open_local(config) as local:

        async def answer(prompt: RealPrompt) -> list[int]:
            request = GenerateRequest(
                RequestContext(prompt.name, timeout_s=600),
                "smollm2",
                prompt.token_ids,
                Depth.SHALLOW,
                SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True),
            )
            return [
                ids for output in [o async for o in local.decode.worker.generate(request)] for ids in output.token_ids
            ]

        answers = await asyncio.gather(*(answer(prompt) for prompt in known.values()))
        counts = await local.decode.counts()
        assert counts.num_preemptions > 0
        assert counts.num_free_blocks == counts.num_blocks
    assert_same_tokens(dict(zip(known, answers, strict=True)), references(known, "shallow"))
