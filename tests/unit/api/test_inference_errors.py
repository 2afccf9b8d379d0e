"""How gRPC calls fail: with a status that says what to do, and again only where that can help."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import pytest
from inference_server import TIMEOUT_S, Inference, client_of, request, told

from shoal.api.inference import SERVICE_NAME
from shoal.api.intake import Services
from shoal.errors import DeadlineExceeded, HandoffError, Overloaded, PlanMismatch, ShoalError, Unavailable
from shoal.wire.statuses import PUSHBACK_KEY, from_rpc_error

METHODS = ["generate", "stream"]


async def refusal(inference: Inference, method: str = "generate", **fields: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(inference, method)(**fields)
    return caught.value


# --- errors of the pools --------------------------------------------------------------------------------

POOL_ERRORS = [
    (Overloaded("full"), grpc.StatusCode.RESOURCE_EXHAUSTED, (429, "overloaded", None), "1000"),
    (Overloaded("full", retry_after_s=7.2), grpc.StatusCode.RESOURCE_EXHAUSTED, (429, "overloaded", None), "7200"),
    (Unavailable("gone", retry_after_s=900), grpc.StatusCode.UNAVAILABLE, (503, "unavailable", None), "119000"),
    (PlanMismatch("other"), grpc.StatusCode.UNAVAILABLE, (503, "peer_gone", None), "1000"),
    (HandoffError("lost"), grpc.StatusCode.UNAVAILABLE, (503, "handoff_failed", None), "1000"),
    (DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED, (504, "deadline_exceeded", None), None),
    (ZeroDivisionError("secret detail"), grpc.StatusCode.INTERNAL, (500, "internal_error", None), None),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("error", "code", "tells", "pushback"), POOL_ERRORS, ids=repr)
async def test_an_error_of_the_pool_is_a_status_with_details(
    inference: Inference, method: str, error: Exception, code: grpc.StatusCode, tells: Any, pushback: str | None
) -> None:
    inference.backend.fail_after, inference.backend.error = 0, error
    refused = await refusal(inference, method)
    assert (refused.code(), told(refused)) == (code, tells)
    assert dict(refused.trailing_metadata()).get(PUSHBACK_KEY) == pushback
    if isinstance(error, ShoalError):
        assert refused.details() == error.message
        assert from_rpc_error(refused).retry_after_s == error.retry_after_s


@pytest.mark.parametrize("fail_after", [0, 2])
@pytest.mark.parametrize("method", METHODS)
async def test_a_defect_keeps_its_text_to_itself(inference: Inference, method: str, fail_after: int) -> None:
    inference.backend.fail_after, inference.backend.error = fail_after, ZeroDivisionError("secret detail")
    refused = await refusal(inference, method)
    assert refused.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in f"{refused.details()}{refused.trailing_metadata()}"
    assert "ZeroDivision" not in f"{refused.details()}{refused.trailing_metadata()}"
    assert [finished[2:] for finished in inference.observer.finished] == [(500, "internal_error")]


# --- before the first token, and after it ---------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
async def test_before_the_first_token_nothing_but_trailers_is_sent(inference: Inference, method: str) -> None:
    inference.backend.fail_after, inference.backend.error = 0, Unavailable("gone")
    asked = request()
    stub = inference.stub.Generate if method == "generate" else inference.stub.GenerateStream
    call = stub(asked, metadata=[("x-request-id", "order-66")], timeout=TIMEOUT_S)
    assert await call.code() == grpc.StatusCode.UNAVAILABLE
    assert dict(await call.initial_metadata()) == {}
    assert dict(await call.trailing_metadata())["x-request-id"] == "order-66"


async def test_a_stream_that_has_begun_fails_for_good(services: Services) -> None:
    async with client_of(services) as inference:
        inference.backend.fail_after, inference.backend.error = 2, Unavailable("gone", retry_after_s=0.01)
        messages = aiter(inference.stub.GenerateStream(request(), timeout=TIMEOUT_S))
        assert [(await anext(messages)).text for _ in range(2)] == ["The", " pools"]
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await anext(messages)
        assert told(ended.value) == (503, "unavailable", None)
    assert inference.observer.finished == [("smollm2", "generate_stream", 503, "unavailable_error")]
    assert inference.observer.refusals == []


# --- messages that are none -----------------------------------------------------------------------------


UNKNOWN = b"\x98\x06\x01"  # number 99


@pytest.mark.parametrize(
    "raw",
    [
        request().SerializeToString() + UNKNOWN,
        request(n=2).SerializeToString() + UNKNOWN * 1000,
        b"\x1a\x06\x0a\x01\x05" + UNKNOWN,
        b"\x22\x0f\x0a\x0a\x0a\x04user\x12\x02Hi" + UNKNOWN,
        b"\x22\x0f\x0a\x0d\x0a\x04user\x12\x02Hi" + UNKNOWN,
    ],
    ids=["GenerateRequest", "many", "TokenIds", "Chat", "ChatMessage"],
)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_field_that_isnt_known_is_refused_as_by_http(inference: Inference, method: str, raw: bytes) -> None:
    call = inference.channel.unary_stream(f"/{SERVICE_NAME}/{method}")(raw, timeout=TIMEOUT_S)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert told(refused.value) == (400, "unknown_field", None)
    assert inference.backend.requests == []


async def test_a_huge_message_is_too_large(inference: Inference) -> None:
    assert told(await refusal(inference, text="a" * 200_000)) == (413, "request_too_large", None)
    assert inference.backend.requests == []


async def test_a_message_that_is_far_too_large_is_not_even_read(inference: Inference) -> None:
    refused = await refusal(inference, text="a" * 400_000)
    assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert inference.backend.requests == []
    assert (await inference.generate()).choices


async def test_an_answer_larger_than_a_request_may_be_is_sent(inference: Inference) -> None:
    response = await inference.generate(n=16, logprobs=20, ignore_eos=True)
    assert response.ByteSize() > 400_000
