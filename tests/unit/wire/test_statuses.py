from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from shoal import errors
from shoal.wire import statuses
from shoal.wire.options import channel_options, server_options
from shoal.wire.ports import bind_first_free

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.ShoalError)]
HIDDEN = [kind for kind in TREE if statuses.STATUS_CODES[kind] is grpc.StatusCode.INTERNAL]
SHOWN = [kind for kind in TREE if kind not in HIDDEN]

Method = Callable[[bytes, Any], Awaitable[bytes]]


@asynccontextmanager
async def serving(method: Method) -> AsyncIterator[str]:
    """A server with one unary method, Fail, on a free loopback port."""
    handler = grpc.method_handlers_generic_handler("test.Errors", {"Fail": grpc.unary_unary_rpc_method_handler(method)})
    server = grpc.aio.server(options=server_options(1 << 20))
    server.add_generic_rpc_handlers((handler,))
    port = bind_first_free(server, "127.0.0.1", 23000, 23999)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def called(address: str) -> errors.ShoalError:
    async with grpc.aio.insecure_channel(address, options=channel_options(1 << 20)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/test.Errors/Fail")(b"", timeout=10)
    return statuses.from_rpc_error(caught.value)


async def over_the_wire(error: Exception) -> errors.ShoalError:
    async def fail(request: bytes, context: Any) -> bytes:
        await statuses.abort(context, error)

    async with serving(fail) as address:
        return await called(address)


def test_the_table_holds_the_whole_tree() -> None:
    assert set(statuses.STATUS_CODES) == set(TREE)


@pytest.mark.parametrize("kind", SHOWN, ids=lambda kind: kind.__name__)
async def test_an_error_comes_back_as_itself(kind: type[errors.ShoalError]) -> None:
    back = await over_the_wire(kind("what to do: ж", param="max_tokens", retry_after_s=1.25))
    assert type(back) is kind
    assert (back.message, back.param, back.retry_after_s) == ("what to do: ж", "max_tokens", 1.25)


@pytest.mark.parametrize("error", [kind("/secret/path") for kind in HIDDEN] + [ValueError("/secret/path")], ids=repr)
async def test_the_text_of_a_defect_is_not_sent(error: Exception) -> None:
    assert b"secret" not in statuses.to_status(error).SerializeToString()
    back = await over_the_wire(error)
    assert "secret" not in back.message
    assert isinstance(back, errors.ShoalError)


async def test_a_message_too_long_for_metadata_still_arrives() -> None:
    back = await over_the_wire(errors.InvalidRequest("x" * 100_000, param="prompt"))
    assert type(back) is errors.InvalidRequest
    assert back.message == "x" * statuses.MAX_MESSAGE_CHARS


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.PeerGone),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
        (grpc.StatusCode.UNIMPLEMENTED, errors.InternalError),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
    ],
)
async def test_a_bare_status_is_read_by_its_code(code: grpc.StatusCode, kind: type[errors.ShoalError]) -> None:
    async def fail(request: bytes, context: Any) -> bytes:
        await context.abort(code, "bare")

    async with serving(fail) as address:
        back = await called(address)
    assert type(back) is kind
    assert back.message == "bare"


def rpc_error(code: grpc.StatusCode, details: bytes) -> Any:
    metadata = ((statuses.DETAILS_KEY, details),)
    return SimpleNamespace(code=lambda: code, details=lambda: "bare", trailing_metadata=lambda: metadata)


def _named(reason: str, domain: str = statuses.DOMAIN) -> Status:
    status = Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="detailed")
    status.details.add().Pack(ErrorInfo(reason=reason, domain=domain))
    return status


def _garbage_inside() -> Status:
    garbage = AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")
    return Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="detailed", details=[garbage])


@pytest.mark.parametrize(
    ("code", "details", "kind", "message"),
    [
        (grpc.StatusCode.UNAVAILABLE, b"\xff\xff", errors.PeerGone, "bare"),
        (grpc.StatusCode.UNAVAILABLE, _garbage_inside().SerializeToString(), errors.PeerGone, "bare"),
        (grpc.StatusCode.ABORTED, _named("UNAVAILABLE").SerializeToString(), errors.LeaseLost, "bare"),
        (grpc.StatusCode.UNAVAILABLE, _named("UNAVAILABLE").SerializeToString(), errors.Unavailable, "detailed"),
        (grpc.StatusCode.UNAVAILABLE, _named("NEW_REASON").SerializeToString(), errors.PeerGone, "detailed"),
        (grpc.StatusCode.UNAVAILABLE, _named("UNAVAILABLE", "other").SerializeToString(), errors.PeerGone, "detailed"),
    ],
    ids=["unreadable", "unreadable detail", "belies the code", "good", "unknown reason", "other domain"],
)
def test_details_are_believed_only_when_they_fit(
    code: grpc.StatusCode, details: bytes, kind: type[errors.ShoalError], message: str
) -> None:
    back = statuses.from_rpc_error(rpc_error(code, details))
    assert type(back) is kind
    assert back.message == message


@pytest.mark.parametrize(
    ("error", "delay_s", "pushback_ms"),
    [
        (errors.Overloaded("full", retry_after_s=2.5), 2.5, "2500"),
        (errors.Unavailable("gone"), 1.0, "1000"),
        (errors.Unavailable("gone", retry_after_s=900), 119.0, "119000"),
        (errors.OutOfBlocks("none left", retry_after_s=0), 0, "1"),
        (errors.DeadlineExceeded("late", retry_after_s=5), None, None),
        (errors.InvalidRequest("wrong"), None, None),
    ],
    ids=repr,
)
async def test_grpc_is_told_when_to_try_again_where_that_may_help(
    error: errors.ShoalError, delay_s: float | None, pushback_ms: str | None
) -> None:
    async def fail(request: bytes, context: Any) -> bytes:
        await statuses.abort(context, error, (("x-request-id", "order-66"),))

    assert statuses.retry_delay_s(error) == delay_s
    async with serving(fail) as address, grpc.aio.insecure_channel(address) as channel:
        trailing = dict(await channel.unary_unary("/test.Errors/Fail")(b"", timeout=10).trailing_metadata())
    assert trailing.get(statuses.PUSHBACK_KEY) == pushback_ms
    assert trailing["x-request-id"] == "order-66"
