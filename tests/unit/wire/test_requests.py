"""What a gateway asks of decode, over the wire and back unchanged; and what the wire may bring that it must not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ProtocolViolation, RequestTooLarge
from shoal.v1 import worker_pb2 as pb
from shoal.wire.messages import (
    Depth,
    GenerateRequest,
    PromptOutline,
    RequestContext,
    Resumption,
    SamplingParams,
    SentChoice,
)
from shoal.wire.requests import MAX_CHOICES, MAX_INT64, from_submit, to_submit
from shoal.wire.values import MAX_ID, MAX_TEXT_CHARS

GATEWAY_ID, KEY = b"g" * 16, 7
SERVER_ID = b"s" * 16
PLAIN = GenerateRequest(
    RequestContext("id", 60.0),
    "tiny",
    (1, 2, 3),
    Depth.SHALLOW,
    SamplingParams(max_tokens=4, num_choices=2),
    resumption=Resumption("plan", (SentChoice((5,)), SentChoice((6, 7), is_complete=True))),
)

ids = st.integers(0, MAX_ID)
texts = st.text(max_size=8)
contexts = st.builds(
    RequestContext, texts, st.floats(0, 1e9), tenant=texts, attempt=st.integers(1, 99), traceparent=st.none() | texts
)


@st.composite
def requests(draw: st.DrawFn) -> GenerateRequest:
    prompt = draw(st.lists(ids, min_size=1, max_size=20).map(tuple))
    max_tokens = draw(st.integers(0, MAX_ID))
    sampling = draw(
        st.builds(
            SamplingParams,
            max_tokens=st.just(max_tokens),
            temperature=st.floats(0, 2),
            top_p=st.floats(0, 1),
            top_k=st.integers(0, MAX_INT64),
            seed=st.integers(0, MAX_INT64),
            num_choices=st.integers(1, 3),
            num_logprobs=st.none() | st.integers(0, 20),
            num_prompt_logprobs=st.none() | st.integers(0, 20),
            stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
            stop_token_ids=st.lists(ids, max_size=3).map(tuple),
            min_tokens=st.integers(0, max_tokens),
            ignore_eos=st.booleans(),
            may_shorten=st.booleans(),
        )
    )
    num_header = draw(st.integers(0, len(prompt)))
    outline = PromptOutline(draw(st.integers(0, len(prompt) - num_header)), num_header)
    resumption = None
    if draw(st.booleans()):
        sent = st.lists(ids, max_size=min(4, max(0, max_tokens - 1))).map(tuple)
        choices = [SentChoice(draw(sent), draw(st.booleans())) for _ in range(sampling.num_choices - 1)]
        resumption = Resumption(draw(texts), (*choices, SentChoice(draw(sent))))
    depth = draw(st.sampled_from([Depth.SHALLOW, Depth.FULL]))
    return GenerateRequest(draw(contexts), draw(texts), prompt, depth, sampling, outline, resumption)


def sent(request: GenerateRequest = PLAIN) -> pb.SubmitRequest:
    return pb.SubmitRequest.FromString(to_submit(GATEWAY_ID, KEY, SERVER_ID, request).SerializeToString())


@given(requests())
def test_a_request_arrives_as_it_was(request: GenerateRequest):
    message = sent(request)
    assert from_submit(message) == request
    assert (message.gateway_id, message.key, message.server_id) == (GATEWAY_ID, KEY, SERVER_ID)


def test_whatever_a_request_has_goes_along():
    """A field that is added to one of these has its place on the wire, or the last test would not see it."""
    for kind, message in (
        (RequestContext, pb.RequestContext),
        (SamplingParams, pb.SamplingParams),
        (PromptOutline, pb.PromptOutline),
        (Resumption, pb.Resumption),
        (SentChoice, pb.SentChoice),
    ):
        assert {field.name for field in fields(kind)} == set(message.DESCRIPTOR.fields_by_name)
    assert {field.name for field in fields(GenerateRequest)} <= set(pb.SubmitRequest.DESCRIPTOR.fields_by_name)


def test_what_no_message_holds_is_refused_before_it_is_sent():
    with pytest.raises(RequestTooLarge):
        to_submit(GATEWAY_ID, KEY, SERVER_ID, replace(PLAIN, resumption=None, prompt_token_ids=(MAX_ID,) * (1 << 19)))


def _with(**changes: Any) -> Callable[[pb.SubmitRequest], None]:
    """Sets fields by their paths, ``a__b`` being ``b`` of ``a``; a list takes the place of another; None clears."""

    def change(message: Any) -> None:
        for path, value in changes.items():
            *parents, name = path.split("__")
            target = message
            for parent in parents:
                target = getattr(target, parent)
            if value is None or isinstance(value, list):
                target.ClearField(name)
                getattr(target, name).extend(value) if value else None
            else:
                setattr(target, name, value)

    return change


def _forget_a_choice(message: pb.SubmitRequest) -> None:
    del message.resumption.choices[0]


def _complete_all(message: pb.SubmitRequest) -> None:
    message.resumption.choices[0].is_complete = True


def _say_all(message: pb.SubmitRequest) -> None:
    message.resumption.choices[0].token_ids.extend([1, 1, 1])


def _say_nonsense(message: pb.SubmitRequest) -> None:
    message.resumption.choices[1].token_ids.append(MAX_ID + 1)


MALFORMED = {
    "no prompt": _with(prompt_token_ids=None),
    "a token id above all": _with(prompt_token_ids=[1, MAX_ID + 1]),
    "no depth": _with(depth=0),
    "a depth that is to be chosen": _with(depth=1),
    "an unknown depth": _with(depth=9),
    "no context": _with(context=None),
    "no time": _with(context__timeout_s=None),
    "endless time": _with(context__timeout_s=math.inf),
    "time that is none": _with(context__timeout_s=math.nan),
    "time before now": _with(context__timeout_s=-1.0),
    "no attempt": _with(context__attempt=0),
    "a long id": _with(context__request_id="x" * (MAX_TEXT_CHARS + 1)),
    "a long tenant": _with(context__tenant="x" * (MAX_TEXT_CHARS + 1)),
    "a long trace": _with(context__traceparent="x" * (MAX_TEXT_CHARS + 1)),
    "a long model": _with(model="x" * (MAX_TEXT_CHARS + 1)),
    "no sampling": _with(sampling=None),
    "a wild temperature": _with(sampling__temperature=math.nan),
    "a cold one": _with(sampling__temperature=-1.0),
    "more than certain": _with(sampling__top_p=1.5),
    "no top_k": _with(sampling__top_k=None),
    "a top_k above all": _with(sampling__top_k=MAX_INT64 + 1),
    "a seed above all": _with(sampling__seed=MAX_INT64 + 1),
    "no choice": _with(sampling__num_choices=0),
    "endless choices": _with(sampling__num_choices=MAX_CHOICES + 1),
    "endless tokens": _with(sampling__max_tokens=MAX_ID + 1),
    "endless alternatives": _with(sampling__num_logprobs=MAX_ID + 1),
    "as many for the prompt": _with(sampling__num_prompt_logprobs=MAX_ID + 1),
    "an empty stop": _with(sampling__stop=["a", ""]),
    "a stop token above all": _with(sampling__stop_token_ids=[MAX_ID + 1]),
    "more tokens than there may be": _with(sampling__min_tokens=5),
    "parts beyond the prompt": _with(outline__num_system_tokens=2, outline__num_header_tokens=2),
    "a long plan": _with(resumption__plan_hash="x" * (MAX_TEXT_CHARS + 1)),
    "a choice too few": _forget_a_choice,
    "nothing left to say": _complete_all,
    "all said": _say_all,
    "nonsense said": _say_nonsense,
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_not_well_formed_is_refused(change: Callable[[pb.SubmitRequest], None]):
    message = sent()
    assert from_submit(message) == PLAIN
    change(message)
    with pytest.raises(ProtocolViolation):
        from_submit(message)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_request_or_refused(data: bytes):
    try:
        message = pb.SubmitRequest.FromString(data)
    except DecodeError:
        return
    try:
        from_submit(message)
    except ProtocolViolation:
        return
