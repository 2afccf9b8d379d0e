"""Greedy answers at full depth, as serving would give them: by the engine, many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shoal.engine.engine import Engine
from shoal.engine.runner import Runner
from shoal.engine.scheduler import Scheduler
from shoal.model.kv_pool import KvPool
from shoal.model.plan import LayerPlan
from shoal.wire.messages import Depth, SamplingParams
from shoal_lab.quality.subject import Subject

_MAX_SEQUENCES = 8
_MAX_STEP_TOKENS = 2048


def greedy_answers(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    on_progress: Callable[[int], None] = lambda num_done: None,
) -> list[tuple[int, ...]]:
    """One answer a prompt, in token ids; an end token ends it and is part of it.

    Holds K/V of eight prompts with their answers. Raises what the engine fails with.
    """
    engine = _engine(subject, max_tokens=max(map(len, prompts)) + max_tokens, num_prompts=len(prompts))
    for index, prompt in enumerate(prompts):
        engine.submit_generate(str(index), tuple(prompt), Depth.FULL, SamplingParams(max_tokens, temperature=0.0))
    answers: list[list[int]] = [[] for _ in prompts]
    num_done = 0
    while num_done < len(prompts):
        output = engine.step()
        for failure in output.failures:
            raise failure.error
        for token in output.tokens:
            answers[int(token.request_id)].append(token.token_id)
            if token.finish_reason is not None:
                num_done += 1
                on_progress(num_done)
    return [tuple(answer) for answer in answers]


@torch.no_grad()
def _engine(subject: Subject, *, max_tokens: int, num_prompts: int) -> Engine:
    num_blocks = _MAX_SEQUENCES * subject.layout.num_blocks_for(max_tokens)
    pool = KvPool(subject.layout, num_blocks, dtype=subject.pool.dtype, device=subject.parameters.embedding.device)
    scheduler = Scheduler(
        subject.layout, num_blocks, max_step_tokens=_MAX_STEP_TOKENS, max_sequences=_MAX_SEQUENCES,
        max_queued=num_prompts,
    )  # fmt: skip
    decoder = subject.decoder(LayerPlan(subject.spec.num_layers, 0), subject.parameters)
    return Engine(
        scheduler, Runner(decoder, pool), eos_token_ids=subject.files.eos_token_ids(), chooser=subject.chooser()
    )
