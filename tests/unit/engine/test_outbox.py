"""Which steps' outputs are told together, and what never waits for others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from shoal.engine.events import EngineCounts, FailureEvent, PromptEvent, Reservation, StepOutput, TokenEvent
from shoal.engine.outbox import MAX_HELD_S, Outbox
from shoal.engine.runner import PrefillChunk
from shoal.errors import InternalError
from shoal.messages import FinishReason

COUNTS = EngineCounts(0, 0, 1, 8, 7, 0, 0)


def token(index: int, reason: FinishReason | None = None, request_id: str = "asks") -> TokenEvent:
    return TokenEvent(request_id, 0, index, 7, None, (), reason, None, 0.0)


def step(*tokens: TokenEvent, ended_s: float = 1.0, **others: Any) -> StepOutput:
    return StepOutput(ended_s - 0.01, ended_s, COUNTS, len(tokens), len(tokens), tokens=tokens, **others)


CHUNK = PrefillChunk("other", 0, 4, range(2), torch.empty(0))
CANNOT_WAIT = {
    "a first token": step(token(3), token(0, request_id="other")),
    "a last token": step(token(3), token(9, FinishReason.LENGTH, "other")),
    "no token": step(),
    "a reservation": step(token(3), reserved=(Reservation("other", (1, 2)),)),
    "a prompt": step(token(3), prompts=(PromptEvent("other", (), None, 0.0),)),
    "a chunk": step(token(3), chunks=(CHUNK,)),
    "a failure": step(token(3), failures=(FailureEvent("other", 0, InternalError("")),)),
    "somebody who wants blocks": step(token(3), wants_blocks=True),
}


def test_by_default_each_step_is_told_by_itself():
    outbox, output = Outbox(), step(token(3))
    assert outbox.take(1.0) == []
    outbox.put(output)
    assert outbox.take(1.0) == [output]
    assert outbox.take(1.0) == []


def test_so_many_steps_are_told_together_in_their_order():
    outbox = Outbox(3)
    outputs = [step(token(index)) for index in range(1, 7)]
    told = []
    for output in outputs:
        outbox.put(output)
        told.append(outbox.take(1.0))
    assert told == [[], [], outputs[:3], [], [], outputs[3:]]


@pytest.mark.parametrize("what", CANNOT_WAIT)
def test_what_cannot_wait_takes_along_what_came_before(what: str):
    outbox, before = Outbox(9), step(token(2))
    outbox.put(before)
    assert outbox.take(1.0) == []
    outbox.put(CANNOT_WAIT[what])
    assert outbox.take(1.0) == [before, CANNOT_WAIT[what]]
    outbox.put(before)
    assert outbox.take(1.0) == [], "that was due, and is gone"


def test_nothing_waits_for_longer_than_a_tenth_of_a_second():
    outbox = Outbox(9)
    first, second = step(token(2), ended_s=0.0), step(token(3), ended_s=0.09)
    outbox.put(first)
    outbox.put(second)
    assert outbox.take(0.9 * MAX_HELD_S) == []
    assert outbox.take(MAX_HELD_S) == [first, second]
    outbox.put(replace(second, ended_s=6.0))
    assert outbox.take(6.0) == [], "the time of what was told before is over"


def test_all_can_be_taken_at_any_time():
    outbox, output = Outbox(9), step(token(2))
    outbox.put(output)
    assert outbox.take_all() == [output]
    assert outbox.take_all() == []
    outbox.put(CANNOT_WAIT["a last token"])
    assert outbox.take_all() == [CANNOT_WAIT["a last token"]]
    outbox.put(output)
    assert outbox.take(1.0) == []
