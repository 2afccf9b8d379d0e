"""What decode generates, over the wire and back unchanged; and what the wire may bring that it must not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from examples import examples
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from shoal.errors import ProtocolViolation
from shoal.v1 import worker_pb2 as pb
from shoal.wire import outputs
from shoal.wire.messages import Depth, FinishReason, HandoffReport, TokenLogprob, TokenOutput, TtftStages
from shoal.wire.outputs import OutputReader, to_outputs

ids = st.integers(0, 2**31 - 1)
texts = st.text(max_size=8)
logarithms = st.floats(max_value=0, allow_nan=False)
tops = st.lists(st.tuples(ids, texts, logarithms), max_size=3).map(tuple)
logprobs = st.lists(st.builds(TokenLogprob, ids, texts, logarithms, tops), max_size=4).map(tuple)
seconds = st.floats(-1, 1e6)
sizes = st.integers(0, 2**40)
counts = st.integers(0, 2**31)
reports = st.builds(
    HandoffReport, st.sampled_from(Depth), st.booleans(), st.none() | texts, counts, sizes, sizes, sizes, counts
)
some_output = st.builds(
    TokenOutput,
    choice=st.integers(0, 200),
    token_ids=st.lists(ids, max_size=3).map(tuple),
    text=texts,
    logprobs=logprobs,
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_reason=st.none() | texts | ids,
    stages=st.none() | st.builds(TtftStages, *[seconds] * 5),
    handoff=st.none() | reports,
    prompt_logprobs=logprobs,
)
PLAIN = TokenOutput(0, (1,), "a")


def over_the_wire(sent: Sequence[TokenOutput]) -> tuple[list[TokenOutput], int, OutputReader]:
    """What arrives, in how many messages, and who read it."""
    messages: list[pb.Output] = []
    for output in sent:
        messages += to_outputs(7, len(messages), output)
    reader = OutputReader()
    read = [reader.read(pb.Output.FromString(message.SerializeToString())) for message in messages]
    assert {message.key for message in messages} <= {7}
    return [output for output in read if output is not None], len(messages), reader


@given(st.lists(some_output, max_size=4))
def test_outputs_arrive_as_they_were(sent: list[TokenOutput]):
    arrived, _, reader = over_the_wire(sent)
    assert arrived == sent and not reader.is_complete


@pytest.mark.parametrize(("number", "num_messages"), [(3, 1), (4, 2), (7, 3)])
def test_much_about_a_prompt_travels_in_parts(monkeypatch: pytest.MonkeyPatch, number: int, num_messages: int):
    monkeypatch.setattr(outputs, "MAX_TOLD_TOKENS", 6)
    told = tuple(TokenLogprob(token, "t", -1.0, ((1, "u", -2.0),)) for token in range(number))
    first = TokenOutput(1, (5,), "a", prompt_logprobs=told)
    assert over_the_wire([first, PLAIN])[:2] == ([first, PLAIN], num_messages + 1)


def message(**values: Any) -> pb.Output:
    (plain,) = to_outputs(7, 0, PLAIN)
    plain.MergeFrom(pb.Output(**values))
    return plain


def without_choice() -> pb.Output:
    plain = message()
    plain.ClearField("choice")
    return plain


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (without_choice, "choice is not set"),
        (lambda: message(finish_reason=77), "finish_reason is 77"),
        (lambda: message(handoff=pb.HandoffReport(num_prefill_layers=1)), "depth is 0"),
        (lambda: message(handoff=pb.HandoffReport(depth=2)), "num_prefill_layers is not set"),
        (lambda: message(stages=pb.TtftStages(reserve_s=1)), "queue_s is not set"),
        (lambda: message(stages=pb.TtftStages(reserve_s=math.nan)), "not a duration"),
        (lambda: message(logprobs=[{"token_id": 1}]), "logprob is not set"),
        (lambda: message(logprobs=[{"logprob": math.nan}]), "not the logarithm"),
        (lambda: message(logprobs=[{"logprob": 0.5}]), "not the logarithm"),
        (lambda: message(index=1), "output 1 of a request came as its number 0"),
    ],
)
def test_what_is_not_well_formed_is_refused(make: Callable[[], pb.Output], said: str):
    with pytest.raises(ProtocolViolation, match=said):
        OutputReader().read(make())


def test_nothing_comes_after_the_end():
    reader = OutputReader()
    assert reader.read(pb.Output(key=7, index=0, is_end=True)) is None and reader.is_complete
    with pytest.raises(ProtocolViolation):
        reader.read(message(index=1))


@examples(100, suppress_health_check=list(HealthCheck))
@given(st.lists(some_output, min_size=1, max_size=3), st.data())
def test_damaged_outputs_raise_nothing_else(sent: list[TokenOutput], data: st.DataObject):
    for number, output in enumerate(sent):
        damaged = bytearray(next(iter(to_outputs(7, number, output))).SerializeToString())
        for _ in range(data.draw(st.integers(1, 4))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        arrived = read_like_grpc(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
        if arrived is not None:
            numbers = [one.logprob for one in (*arrived.logprobs, *arrived.prompt_logprobs)]
            assert not any(math.isnan(number) or number > 0 for number in numbers)
            assert arrived.finish_reason is None or arrived.finish_reason in FinishReason


def read_like_grpc(data: bytes) -> TokenOutput | None:
    """gRPC drops what is no message; what is one is read as the next of its request, or refused."""
    try:
        message = pb.Output.FromString(data)
    except DecodeError:
        return None
    message.index = 0
    try:
        return OutputReader().read(message)
    except ProtocolViolation:
        return None
