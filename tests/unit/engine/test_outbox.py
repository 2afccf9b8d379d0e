"""Which steps' outputs are told together, and what never waits for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.engine.events import EngineCounts, FailureEvent, PromptEvent, Reservation, StepOutput, TokenEvent
from shoal.engine.outbox import MAX_HELD_S, Outbox
from shoal.engine.runner import PrefillChunk
from shoal.errors import InternalError
from shoal.wire.messages import FinishReason

COUNTS = EngineCounts(0, 0, 1, 8, 7, 0, 0)


def token(index: int, reason: FinishReason | None = None, **others: Any) -> TokenEvent:
    return TokenEvent("asks", 0, index, 7, None, (), reason, None, 0.0, **others)


def step(*tokens: TokenEvent, started_s: float = 0.0, ended_s: float = 0.0, **others: Any) -> StepOutput:
    return StepOutput(started_s, ended_s, COUNTS, len(tokens), len(tokens), tokens=tokens, **others)


CHUNK = PrefillChunk("other", 0, 4, range(2), torch.empty(0))
CANNOT_WAIT = {
    "a first token": step(token(3), token(0, is_first=True)),
    "the first token of an answer that goes on": step(token(3), token(7, is_first=True)),
    "a last token": step(token(3), token(9, FinishReason.LENGTH)),
    "no token": step(),
    "a reservation": step(token(3), reserved=(Reservation("other", (1, 2)),)),
    "a prompt": step(token(3), prompts=(PromptEvent("other", (), None, 0.0),)),
    "a chunk": step(token(3), chunks=(CHUNK,)),
    "a failure": step(token(3), failures=(FailureEvent("other", 0, InternalError("")),)),
}


def test_so_many_steps_are_told_together_in_their_order():
    outbox = Outbox(3)
    outputs = [step(token(index)) for index in range(1, 7)]
    told = []
    for output in outputs:
        outbox.put(output)
        told.append(outbox.take())
    assert told == [[], [], outputs[:3], [], [], outputs[3:]]


@pytest.mark.parametrize("what", CANNOT_WAIT)
def test_what_cannot_wait_takes_along_what_came_before(what: str):
    outbox, before = Outbox(9), step(token(2))
    outbox.put(before)
    assert outbox.take() == []
    outbox.put(CANNOT_WAIT[what])
    assert outbox.take() == [before, CANNOT_WAIT[what]]
    outbox.put(before)
    assert outbox.take() == [], "that was due, and is gone"


def test_nothing_waits_for_longer_than_a_tenth_of_a_second_if_steps_take_as_long_as_before():
    outbox = Outbox(9)
    quick, slow = 0.2 * MAX_HELD_S, 0.5 * MAX_HELD_S
    steps = [step(token(index), started_s=index * quick, ended_s=(index + 1) * quick) for index in range(5)]
    for output in steps[:4]:
        outbox.put(output)
        assert outbox.take() == []
    outbox.put(steps[4])
    assert outbox.take() == steps, "after another such step the first one would be too old"
    first, second = (step(token(index), started_s=index * slow, ended_s=(index + 1) * slow) for index in range(2))
    outbox.put(first)
    assert outbox.take() == []
    outbox.put(second)
    assert outbox.take() == [first, second]
    alone = step(token(2), started_s=0.0, ended_s=MAX_HELD_S)
    outbox.put(alone)
    assert outbox.take() == [alone], "the next one would bring it too late"


def test_whether_blocks_are_wanted_is_told_at_once():
    outbox, wanting, content = Outbox(9), step(token(2), wants_blocks=True), step(token(3))
    outbox.put(wanting)
    assert outbox.take() == [wanting]
    outbox.put(wanting)
    assert outbox.take() == [], "that's known"
    outbox.put(content)
    assert outbox.take() == [wanting, content]
    outbox.put(content)
    assert outbox.take() == []
