"""What a gRPC request is to the validator that both doors share."""

from __future__ import annotations

from typing import NoReturn

import pytest

from shoal.api import protobuf
from shoal.api.protobuf import to_body
from shoal.api.validation import ServedModel
from shoal.config import GatewayConfig
from shoal.errors import ContextLengthExceeded, InvalidRequest
from shoal.v1 import inference_pb2 as pb

MODEL = ServedModel("tiny", max_context_tokens=100, vocab_size=50)
CONFIG = GatewayConfig(max_stop_strings=4, max_messages=150)


def with_chat(num_turns: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="a")] * num_turns))


def with_ids(num_ids: int, max_tokens: int | None = None) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * num_ids), max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        (with_chat(101), InvalidRequest, "messages: at most 100 messages fit the model's context"),
        (with_chat(151), InvalidRequest, "messages: at most 150 messages"),
        (with_ids(100), ContextLengthExceeded, "prompt: 100 tokens and an answer of up to 1 are more"),
        (with_ids(101, 7), ContextLengthExceeded, "prompt: 101 tokens and an answer of up to 7 are more"),
        (with_ids(101, -7), ContextLengthExceeded, "prompt: 101 tokens and an answer of up to 1 are more"),
        (pb.GenerateRequest(text="a", stop=["b"] * 5), InvalidRequest, "stop: at most 4 strings"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, pb.GenerateRequest) else None,
)
def test_what_is_too_long_is_refused_before_it_is_converted(
    request_: pb.GenerateRequest, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def converted(*_: object) -> NoReturn:
        raise AssertionError("it was converted")

    monkeypatch.setattr(protobuf, "check", converted)
    with pytest.raises(kind, match=message):
        to_body(request_, MODEL, CONFIG)


@pytest.mark.parametrize(
    "request_",
    [with_chat(100), with_ids(99), pb.GenerateRequest(text="a", stop=["b"] * 4)],
    ids=["chat", "ids", "stop"],
)
def test_what_may_just_fit_is_left_to_the_validator(request_: pb.GenerateRequest) -> None:
    assert to_body(request_, MODEL, CONFIG).model == "tiny"
