from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from shoal.v1 import handoff_pb2 as pb
from shoal.v1 import handoff_pb2_grpc as pb_grpc
from shoal.wire import frames, options
from shoal.wire.handoff_messages import Accepted, Chunk, Envelope
from shoal.wire.ports import bind_first_free
from shoal.wire.values import MAX_ID

LEASE = bytes(16)


@pytest.mark.parametrize(
    ("client", "server"),
    [
        (dict(options.HANDOFF_CHANNEL_OPTIONS), dict(options.HANDOFF_SERVER_OPTIONS)),
        (dict(options.client_options("a.Service", 4)), dict(options.server_options(4 << 20))),
    ],
    ids=["hand-off", "client"],
)
def test_a_server_tolerates_the_pings_of_its_own_clients(client: dict[str, Any], server: dict[str, Any]) -> None:
    assert server["grpc.http2.min_ping_interval_without_data_ms"] < client["grpc.keepalive_time_ms"]
    assert server["grpc.keepalive_permit_without_calls"] == client["grpc.keepalive_permit_without_calls"] == 1


def test_nothing_retries_by_itself_or_goes_through_a_proxy() -> None:
    client = dict(options.HANDOFF_CHANNEL_OPTIONS)
    assert client["grpc.enable_retries"] == 0
    assert (
        client["grpc.enable_http_proxy"] == dict(options.client_options("a.Service", 4))["grpc.enable_http_proxy"] == 0
    )


class Echo(pb_grpc.HandoffServiceServicer):
    """Answers each request with a prompt as long as the request's sequence number."""

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.SessionResponse]:  # type: ignore[override]
        async for request in request_iterator:
            num_tokens = request.chunk.seq
            yield frames.to_response(Envelope(1, Accepted(LEASE, (MAX_ID,) * num_tokens, 0, 1, 1.0)))


async def session_with(channel_options: options.Options, request: pb.SessionRequest) -> pb.SessionResponse:
    server = grpc.aio.server(options=options.HANDOFF_SERVER_OPTIONS)
    pb_grpc.add_HandoffServiceServicer_to_server(Echo(), server)
    port = bind_first_free(server, "127.0.0.1", 25000, 25999)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options) as channel:
            stream = pb_grpc.HandoffServiceStub(channel).Session(timeout=10)
            await stream.write(request)
            response: pb.SessionResponse = await stream.read()
            return response
    finally:
        await server.stop(None)


async def test_the_largest_chunk_and_the_longest_smollm_prompt_fit_a_frame() -> None:
    request = frames.to_request(Envelope(1, Chunk(LEASE, 8192, 0, 1, 0, 1, 0, bytes(frames.MAX_PAYLOAD_BYTES))))
    response = await session_with(options.HANDOFF_CHANNEL_OPTIONS, request)
    assert len(response.accepted.token_ids) == 8192


async def test_a_server_refuses_what_a_careless_client_sends_beyond_the_limit() -> None:
    request = pb.SessionRequest(incarnation=1, chunk=pb.Chunk(payload=bytes(3 << 20)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await session_with((), request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
