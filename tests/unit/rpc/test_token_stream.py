"""A gateway's and a decode replica's ends of the token streams, joined by gRPC on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import grpc.aio
import pytest

from shoal.errors import PeerGone, ProtocolViolation
from shoal.messages import TokenLogprob, TokenOutput
from shoal.rpc import token_server
from shoal.rpc.options import HANDOFF_SERVER_OPTIONS
from shoal.rpc.ports import bind_first_free, join_address
from shoal.rpc.token_client import TokenClient, TokenStream
from shoal.rpc.token_server import ID_BYTES, Outlet, Place, TokenServer
from shoal.v1 import worker_pb2 as pb
from shoal.v1.worker_pb2_grpc import WorkerServiceStub


def output(number: int, text: str = "") -> TokenOutput:
    return TokenOutput(0, (number,), text)


class Decode:
    """A decode replica's token server, listening; it can be lost and come back on another port."""

    def __init__(self) -> None:
        self.tokens = TokenServer()
        self.address = ""
        self._server: grpc.aio.Server | None = None

    async def listen(self) -> None:
        self._server = grpc.aio.server(options=HANDOFF_SERVER_OPTIONS)
        self.tokens.add_to(self._server)
        port = bind_first_free(self._server, "127.0.0.1", 20_000, 29_999)
        await self._server.start()
        self.address = join_address("127.0.0.1", port)

    @property
    def place(self) -> Place:
        return self.tokens.at(self.address)

    async def vanish(self) -> None:
        """As a process that dies: every connection is gone at once."""
        if self._server is not None:
            await self._server.stop(None)


@asynccontextmanager
async def joined(patience_s: float = 0.01) -> AsyncIterator[tuple[Decode, TokenClient]]:
    decode, client = Decode(), TokenClient(patience_s)
    await decode.listen()
    try:
        yield decode, client
    finally:
        await client.close()
        await decode.vanish()
        assert not client._open and not client._readers, "a request or a stream is left"
        async with asyncio.timeout(10):
            while decode.tokens.num_gateways:  # gRPC doesn't wait for what it cancels
                await asyncio.sleep(0)


class Request:
    """A request on both ends."""

    def __init__(self, decode: Decode, stream: TokenStream, outlet: Outlet) -> None:
        self.stream, self.outlet = stream, outlet
        self._decode = decode

    def follow(self) -> None:
        self.stream.follow(self._decode.place)

    async def read(self) -> list[TokenOutput]:
        return [one async for one in self.stream]


@pytest.fixture
def requests() -> Iterator[Any]:
    with ExitStack() as held:

        def begin(decode: Decode, client: TokenClient) -> Request:
            stream = held.enter_context(client.open())
            return Request(decode, stream, held.enter_context(decode.tokens.open(stream.listener)))

        begin.close = held.close  # type: ignore[attr-defined]
        yield begin


async def send_for_ever(outlet: Outlet) -> None:
    """Until decode has heard that nobody listens."""
    async with asyncio.timeout(10):
        while True:
            outlet.send(output(1))
            await asyncio.sleep(0)


async def test_outputs_arrive_in_order_and_then_the_end(requests: Any):
    async with joined() as (decode, client):
        one = requests(decode, client)
        one.outlet.send(output(0))  # before anybody listens
        one.follow()
        for number in range(1, 100):
            one.outlet.send(output(number))
        await one.outlet.end()
        assert await one.read() == [output(number) for number in range(100)]
        requests.close()


async def test_requests_share_a_stream_and_get_their_own(requests: Any):
    async with joined() as (decode, client):
        several = [requests(decode, client) for _ in range(5)]
        for index, one in enumerate(several):
            one.follow()
            one.outlet.send(output(index))
            await one.outlet.end()
        assert [await one.read() for one in several] == [[output(index)] for index in range(5)]
        assert len(client._readers) == 1
        requests.close()


async def test_what_a_step_brings_is_one_message(requests: Any, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    plain = token_server._batches

    def counting(outputs: Any) -> Any:
        for batch in plain(outputs):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(token_server, "_batches", counting)
    async with joined() as (decode, client):
        several = [requests(decode, client) for _ in range(8)]
        several[0].follow()
        several[0].outlet.send(output(0))
        await anext(aiter(several[0].stream))  # now the stream is there
        for one in several:
            one.follow()
            one.outlet.send(output(1))
        await asyncio.gather(*(anext(aiter(one.stream)) for one in several))
        assert sizes == [1, 8]
        requests.close()


async def test_a_message_stays_below_what_a_channel_takes(requests: Any):
    async with joined() as (decode, client):
        one = requests(decode, client)
        told = tuple(TokenLogprob(1, "word" * 8, -1.0, ((1, "word" * 8, -1.0),) * 200) for _ in range(2048))
        one.follow()
        one.outlet.send(TokenOutput(0, (1,), "", prompt_logprobs=told))
        await one.outlet.end()
        (arrived,) = await one.read()
        assert arrived.prompt_logprobs == told
        requests.close()


async def test_a_replica_that_goes_away_ends_its_requests_and_no_others(requests: Any):
    async with joined() as (decode, client), joined() as (other, _):
        lost, kept = requests(decode, client), requests(other, client)
        for one in (lost, kept):
            one.follow()
            one.outlet.send(output(0))
            assert await anext(aiter(one.stream)) == output(0)
        await decode.vanish()
        with pytest.raises(PeerGone):
            await anext(aiter(lost.stream))
        kept.outlet.send(output(1))
        await kept.outlet.end()
        assert await kept.read() == [output(1)]
        requests.close()
        await client.close()


async def test_a_replica_that_is_not_there_ends_the_request(requests: Any):
    async with joined() as (decode, client):
        one = requests(decode, client)
        one.stream.follow(replace(decode.place, address="127.0.0.1:1"))
        with pytest.raises(PeerGone):
            await one.read()
        requests.close()


async def test_who_placed_the_request_may_know_better_why_it_ended(requests: Any):
    async with joined(patience_s=60) as (decode, client):
        one = requests(decode, client)
        one.follow()
        one.outlet.send(output(0))
        await anext(aiter(one.stream))
        await decode.vanish()
        one.stream.fail(PeerGone("Ray says so"))
        with pytest.raises(PeerGone, match="Ray says so"):
            await anext(aiter(one.stream))
        requests.close()


async def test_a_gateway_that_goes_away_ends_its_requests_on_decode(requests: Any):
    async with joined() as (decode, client):
        one = requests(decode, client)
        one.follow()
        one.outlet.send(output(0))
        await anext(aiter(one.stream))
        await client.close()
        with pytest.raises(PeerGone, match="doesn't listen"):
            await send_for_ever(one.outlet)
        requests.close()


async def test_after_a_lost_stream_the_next_request_gets_a_new_one(requests: Any):
    async with joined() as (decode, client):
        first = requests(decode, client)
        first.follow()
        first.outlet.send(output(0))
        await anext(aiter(first.stream))
        await client.close()
        second = requests(decode, client)
        second.follow()
        with pytest.raises(PeerGone):
            await send_for_ever(first.outlet)
        third = requests(decode, client)
        third.follow()
        third.outlet.send(output(7))
        await third.outlet.end()
        assert await third.read() == [output(7)]
        requests.close()


async def test_a_second_stream_of_a_gateway_ends_what_the_first_may_have_lost(requests: Any):
    async with joined() as (decode, client):
        one = requests(decode, client)
        one.follow()
        one.outlet.send(output(0))
        await anext(aiter(one.stream))
        async with grpc.aio.insecure_channel(decode.address) as channel:
            stub: Any = WorkerServiceStub(channel)  # type: ignore[no-untyped-call, unused-ignore]
            call = stub.Follow(
                pb.FollowRequest(gateway_id=one.stream.listener.gateway_id, server_id=decode.place.server_id)
            )
            with pytest.raises(PeerGone):  # the gateway's: its stream was ended
                await anext(aiter(one.stream))
            with pytest.raises(PeerGone):
                one.outlet.send(output(1))
            call.cancel()
        requests.close()


async def test_outputs_of_a_request_that_was_given_up_are_dropped(requests: Any):
    async with joined() as (decode, client):
        with client.open() as given_up:
            late = decode.tokens.open(given_up.listener)
            outlet = late.__enter__()
            given_up.follow(decode.place)
        one = requests(decode, client)
        one.follow()
        outlet.send(output(9))
        one.outlet.send(output(1))
        await one.outlet.end()
        assert await one.read() == [output(1)]
        late.__exit__(None, None, None)
        requests.close()


async def test_a_gap_ends_the_request(requests: Any):
    async with joined() as (decode, client):
        one = requests(decode, client)
        one.follow()
        one.outlet.send(output(0))
        one.outlet._num_sent += 1
        one.outlet.send(output(2))
        assert await anext(aiter(one.stream)) == output(0)
        with pytest.raises(ProtocolViolation):
            await anext(aiter(one.stream))
        requests.close()


async def test_a_gateway_without_a_proper_id_is_refused():
    async with joined() as (decode, _), grpc.aio.insecure_channel(decode.address) as channel:
        stub: Any = WorkerServiceStub(channel)  # type: ignore[no-untyped-call, unused-ignore]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Follow(pb.FollowRequest(gateway_id=b"short")).read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_request_that_is_complete_waits_for_its_gateway(requests: Any):
    """The first one at a replica may be done before the stream is there."""
    async with joined() as (decode, client):
        one = requests(decode, client)
        one.outlet.send(output(0))
        ending = asyncio.create_task(one.outlet.end())
        await asyncio.sleep(0)
        assert not ending.done()
        one.follow()
        await ending
        assert await one.read() == [output(0)]
        requests.close()


async def test_another_process_at_the_same_address_is_not_taken_for_the_replica(requests: Any):
    """One that came after it on its port, or that is at the gateway's own loopback."""
    async with joined() as (decode, client), joined() as (other, _):
        one = requests(decode, client)
        one.stream.follow(replace(decode.place, address=other.address))
        with pytest.raises(PeerGone):
            await one.read()
        requests.close()
        await client.close()


async def test_a_replica_can_not_speak_for_another_one(requests: Any):
    async with joined() as (decode, client), joined() as (other, _):
        own, foreign = requests(decode, client), requests(other, client)
        own.follow()
        foreign.follow()
        with other.tokens.open(own.stream.listener) as forged:
            forged.send(output(666))
            foreign.outlet.send(output(1))
            assert await anext(aiter(foreign.stream)) == output(1)  # what was sent before it is here, too
            own.outlet.send(output(2))
            assert await anext(aiter(own.stream)) == output(2)
        requests.close()
        await client.close()


async def test_a_connection_may_take_a_while(requests: Any):
    async with joined() as (decode, client):
        slow = await asyncio.start_server(partial(_forward_late, decode.address), "127.0.0.1", 0)
        async with slow:
            one = requests(decode, client)
            port = slow.sockets[0].getsockname()[1]
            one.stream.follow(replace(decode.place, address=f"127.0.0.1:{port}"))
            one.outlet.send(output(0))
            await one.outlet.end()
            assert await one.read() == [output(0)]
            requests.close()
            await client.close()


async def _forward_late(address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.3)  # longer than gRPC gives a connection by itself
    host, port = address.rsplit(":", 1)
    far_reader, far_writer = await asyncio.open_connection(host, int(port))

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        target.close()

    await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))


async def test_a_server_that_closes_ends_all_streams(requests: Any):
    async with joined() as (decode, client):
        one = requests(decode, client)
        one.follow()
        one.outlet.send(output(0))
        await anext(aiter(one.stream))
        decode.tokens.close()
        with pytest.raises(PeerGone):
            one.outlet.send(output(1))
        with pytest.raises(PeerGone):
            await anext(aiter(one.stream))
        requests.close()


async def test_no_more_gateways_than_can_be_are_listened_to(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_server, "MAX_GATEWAYS", 0)
    async with joined() as (decode, _), grpc.aio.insecure_channel(decode.address) as channel:
        stub: Any = WorkerServiceStub(channel)  # type: ignore[no-untyped-call, unused-ignore]
        request = pb.FollowRequest(gateway_id=b"g" * ID_BYTES, server_id=decode.place.server_id)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Follow(request).read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_gateway_that_never_comes_is_not_waited_for_for_ever():
    tokens = TokenServer()
    with tokens.open(token_server.Listener(b"g" * ID_BYTES, 1)) as outlet:
        outlet.send(output(0))
        assert tokens.num_gateways == 1
        with pytest.raises(PeerGone, match="come to listen"):
            await outlet.end(timeout_s=0.01)
    assert tokens.num_gateways == 0
