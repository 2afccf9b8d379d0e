"""Twenty real prompts, what the references say to them, and how answers are compared token for token."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from models import smollm2_reference
from reference import Generated, full_generate, pop_generate
from shoal.model.files import locate
from texts import prompts

NUM_TOKENS = 64
NUM_SKIPPED = 10
# A first difference is excused only where the reference itself was undecided.
MAX_EXCUSED_GAP = 1e-4
# Every difference that was, with its test: conftest.py lists them at the end of the run.
EXCUSED: list[str] = []


@dataclass(frozen=True)
class RealPrompt:
    """A prompt's ids, and 64 greedy tokens in float32: transformers' own, and the paper's at ten skipped layers."""

    name: str
    token_ids: tuple[int, ...]
    full: Generated
    shallow: Generated


@functools.cache
def begin() -> tuple[ProcessPoolExecutor, tuple[Future[RealPrompt], ...]]:
    """Have the references computed, beside whatever else runs: two minutes of all cores, in processes that yield.

    One process a core, of one thread each: a reference decodes token by token, where a second thread wins nothing.
    """
    workers = ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), initializer=_yielding)
    # Longest first, so that no core ends with a long one alone.
    names = sorted(prompts(), key=lambda name: -len(prompts()[name]))
    return workers, tuple(workers.submit(_refer, name) for name in names)


@functools.cache
def real_prompts() -> tuple[RealPrompt, ...]:
    """All twenty with their references; computed once a run, so share it."""
    workers, asked = begin()
    with workers:
        return tuple(sorted((future.result() for future in asked), key=lambda prompt: prompt.name))


def end() -> None:
    """Of what was begun, take back what nobody waited for."""
    if begin.cache_info().currsize:
        begin()[0].shutdown(cancel_futures=True)


def _yielding() -> None:
    # Where Linux groups processes by their session, one's niceness counts within its group alone: so one of their own.
    os.setsid()
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text("19", encoding="ascii")
    os.nice(19)
    torch.set_num_threads(1)


def _refer(name: str) -> RealPrompt:
    model = smollm2_reference()
    ids = tuple(locate("smollm2").tokenizer().encode(prompts()[name]))
    return RealPrompt(
        name, ids, full_generate(model, ids, NUM_TOKENS), pop_generate(model, ids, NUM_TOKENS, NUM_SKIPPED)
    )


def ids_of(known: Mapping[str, RealPrompt]) -> dict[str, tuple[int, ...]]:
    return {name: prompt.token_ids for name, prompt in known.items()}


def references(known: Mapping[str, RealPrompt], depth: str) -> dict[str, Generated]:
    """What each prompt's answer must be at ``depth`` (shallow or full)."""
    return {name: getattr(prompt, depth) for name, prompt in known.items()}


def assert_same_tokens(answers: Mapping[str, Sequence[int]], references: Mapping[str, Generated]) -> list[str]:
    """Every answer equals its reference, or first differs where the reference's two best logits were closer than
    ``MAX_EXCUSED_GAP``. Returns what was excused; the end of the run lists it, too."""
    assert answers.keys() == references.keys()
    excused, wrong = [], []
    for name, reference in references.items():
        ours, theirs = list(answers[name]), list(reference.token_ids)
        assert len(ours) == len(theirs), f"{name}: {len(ours)} tokens for {len(theirs)}"
        first = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
        if first is not None:
            line = f"{name}: token {first} is {ours[first]}, not {theirs[first]} (gap {reference.gaps[first]:.2e})"
            (excused if reference.gaps[first] < MAX_EXCUSED_GAP else wrong).append(line)
    assert not wrong, "\n".join(wrong)
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    EXCUSED.extend(f"{test} {line}" for line in excused)
    return excused
