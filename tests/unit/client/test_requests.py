from __future__ import annotations

from typing import Any

import pytest

from shoal.client import Client, InvalidRequest, Message
from shoal.client.requests import GenerateOptions, to_request
from shoal.v1 import inference_pb2 as pb


@pytest.mark.parametrize(
    "prompt",
    [
        b"bytes",
        None,
        {"role": "user", "content": "Hi"},
        [1, "two"],
        [True],
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_a_type_error(prompt: Any) -> None:
    with pytest.raises(TypeError, match="the prompt must be a str, a sequence of int, or a sequence of messages"):
        to_request(prompt, {})


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ([2**31], "prompt"),
        ("half a pair: \ud800", "prompt"),
        ([{"role": "user", "content": "Hi"}, {"role": "user", "content": "\ud800"}], "prompt[1]"),
        ([Message("\udfff", "Hi")], "prompt[0]"),
        ([{"role": "user"}], "prompt[0]"),
        ([Message("user", "Hi"), {"role": "user", "content": "Hi", "name": "Ann"}], "prompt[1]"),
    ],
    ids=repr,
)
def test_a_prompt_that_cant_be_sent_is_refused(prompt: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_request(prompt, {})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", "64"), ("temperature", "hot"), ("stop", 5), ("stop", [5]), ("model", 5), ("ignore_eos", "yes")],
)
def test_an_option_of_another_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be "):
        to_request("The sea is", {name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("max_tokens", 2**31), ("seed", 2**63), ("depth", "deep"), ("depth", 7), ("stop", "\ud800")]
)
def test_an_option_that_cant_be_sent_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_request("The sea is", {name: value})
    assert caught.value.param == name


def test_an_unknown_keyword_is_named_with_those_there_are() -> None:
    with Client() as client, pytest.raises(TypeError, match="no keyword max_token: there are model, max_tokens"):
        client.generate("The sea is", max_token=5)  # type: ignore[call-arg]


def test_the_keywords_are_the_fields_of_the_proto() -> None:
    fields = {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields if field.containing_oneof is None}
    optional = {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields if field.has_presence}
    prompts = {field.name for field in pb.GenerateRequest.DESCRIPTOR.oneofs_by_name["prompt"].fields}
    assert set(GenerateOptions.__annotations__) == (fields | optional) - prompts


@pytest.mark.parametrize(("name", "value"), [("timeout_s", 0), ("timeout_s", float("inf")), ("request_id", "a b")])
def test_a_deadline_or_an_id_that_cant_be_sent_is_refused(name: str, value: Any) -> None:
    with Client() as client, pytest.raises(InvalidRequest) as caught:
        client.generate("The sea is", **{name: value})
    assert caught.value.param == name
