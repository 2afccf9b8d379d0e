"""Streams that break, and peers that aren't who they should be: requests end, each with an error, and no others do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from token_streams import Joined, Request, generate_request, joined, output

from shoal.errors import PeerGone, ProtocolViolation, RequestTooLarge, Unauthenticated
from shoal.v1 import worker_pb2 as pb
from shoal.v1.worker_pb2_grpc import WorkerServiceStub
from shoal.wire import token_client, token_server
from shoal.wire.requests import to_submit
from shoal.wire.token_server import ID_BYTES, Outlet
from shoal.wire.values import MAX_ID


async def send_for_ever(outlet: Outlet) -> None:
    """Until decode has heard that nobody listens."""
    async with asyncio.timeout(10):
        while True:
            outlet.send(output(1))
            await asyncio.sleep(0)


async def refusal(address: str, request: pb.FollowRequest) -> grpc.StatusCode:
    """What a stranger's stream ends with."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = WorkerServiceStub(channel)  # type: ignore[no-untyped-call, unused-ignore]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Follow(request).read()
    return refused.value.code()


def submitted(one: Request, **changes: Any) -> pb.SubmitRequest:
    """A message of this request, with some of its fields changed."""
    place = one.stream.place
    assert place is not None
    message = to_submit(one.stream.ticket, place.server_id, generate_request(1))
    for name in changes:
        message.ClearField(name)
    message.MergeFrom(pb.SubmitRequest(**changes))
    return message


async def refused_submit(address: str, request: pb.SubmitRequest) -> grpc.StatusCode:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = WorkerServiceStub(channel)  # type: ignore[no-untyped-call, unused-ignore]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Submit(request)
    return refused.value.code()


async def test_a_replica_that_goes_away_ends_its_requests_and_no_others():
    async with joined() as both, joined() as other:
        lost, kept = await both.running(), other.request(both.client)
        kept.follow()
        await both.decode.vanish()
        with pytest.raises(PeerGone):
            await lost.first()
        kept.outlet.send(output(1))
        await kept.outlet.end()
        assert await kept.rest() == [output(1)]


async def test_a_replica_that_is_not_there_ends_the_request():
    async with joined() as both:
        one = both.request()
        one.stream.follow(replace(both.decode.place, address="127.0.0.1:1"))
        with pytest.raises(PeerGone):
            await one.rest()


async def test_who_is_not_trusted_is_not_called_dead(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """Clients and operators are told apart what it is: one to ask again, the other which address to look at."""
    async with joined(patience_s=0) as both:
        address = "127.0.0.1:1"
        monkeypatch.setattr(token_client, "refusal", lambda _error, of: Unauthenticated(f"{of} shows no certificate"))
        one = both.request()
        one.stream.follow(replace(both.decode.place, address=address))
        with pytest.raises(PeerGone, match="don't trust each other"):
            await one.rest()
        await one.stream.submit(generate_request(1))
    assert caplog.text.count(f"{address} shows no certificate") == 1


async def test_a_gateway_that_goes_away_ends_its_requests_on_decode():
    async with joined() as both:
        one = await both.running()
        await both.client.close()
        with pytest.raises(PeerGone, match="has ended"):
            await send_for_ever(one.outlet)


async def test_a_server_that_closes_ends_all_streams():
    async with joined() as both:
        one = await both.running()
        both.decode.tokens.close()
        with pytest.raises(PeerGone):
            one.outlet.send(output(1))
        with pytest.raises(PeerGone):
            await one.first()


async def test_after_a_lost_stream_the_next_request_gets_a_new_one():
    async with joined() as both:
        first = await both.running()
        await both.client.close()
        both.request().follow()
        with pytest.raises(PeerGone):
            await send_for_ever(first.outlet)
        assert (await both.running()).stream.place == both.decode.place


async def test_a_second_stream_of_a_gateway_ends_what_the_first_may_have_lost():
    async with joined() as both:
        one = await both.running()
        async with grpc.aio.insecure_channel(both.decode.address) as channel:
            stub: Any = WorkerServiceStub(channel)  # type: ignore[no-untyped-call, unused-ignore]
            gateway_id, server_id = one.stream.ticket.gateway_id, both.decode.place.server_id
            call = stub.Follow(pb.FollowRequest(gateway_id=gateway_id, server_id=server_id))
            with pytest.raises(PeerGone):  # the gateway's: its stream was ended
                await one.first()
            with pytest.raises(PeerGone):
                one.outlet.send(output(1))
            call.cancel()


async def test_a_request_is_not_waited_for_from_a_gateway_that_went_away():
    async with joined() as both:
        one = await both.running()
        waiting = asyncio.create_task(one.outlet.request(timeout_s=60))
        await asyncio.sleep(0)  # let it begin
        await both.client.close()
        with pytest.raises(PeerGone, match="has ended"):
            await waiting


async def test_a_request_that_no_call_waits_for_is_refused_and_not_kept():
    async with joined() as both:
        one = await both.running()
        stranger = await refused_submit(both.decode.address, submitted(one, key=one.stream.ticket.key ^ 1))
        assert stranger is grpc.StatusCode.UNAVAILABLE
        unknown = await refused_submit(both.decode.address, submitted(one, gateway_id=b"g" * ID_BYTES))
        assert unknown is grpc.StatusCode.UNAVAILABLE
        assert both.decode.tokens.num_gateways == 1
        with pytest.raises(PeerGone, match="bring the request"):
            await one.outlet.request(timeout_s=0.01)


async def test_a_request_for_another_process_is_refused():
    async with joined() as both:
        one = await both.running()
        asked = submitted(one, server_id=b"s" * ID_BYTES)
        assert await refused_submit(both.decode.address, asked) is grpc.StatusCode.UNAVAILABLE


async def test_a_request_is_taken_once():
    """What is sent twice doesn't change what runs."""
    async with joined() as both:
        one = await both.running()
        await one.stream.submit(generate_request(1))
        asked = to_submit(one.stream.ticket, both.decode.place.server_id, generate_request(2))
        assert await refused_submit(both.decode.address, asked) is grpc.StatusCode.INVALID_ARGUMENT
        assert await one.outlet.request() == generate_request(1)


async def test_one_call_has_one_outlet():
    async with joined() as both:
        one = await both.running()
        with pytest.raises(ProtocolViolation), both.decode.tokens.open(one.stream.ticket):
            pytest.fail("it was opened twice")
        one.outlet.send(output(1))
        assert await one.first() == output(1)


async def test_a_malformed_request_ends_it_with_what_is_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_client, "to_submit", lambda *_: submitted(one, prompt_token_ids=[MAX_ID + 1]))
    async with joined() as both:
        one = await both.running()
        await one.stream.submit(generate_request(1))
        with pytest.raises(ProtocolViolation, match="prompt_token_ids"):
            await one.rest()


async def test_a_request_for_a_replica_that_went_away_ends():
    async with joined() as both:
        one = await both.running()
        await both.decode.vanish()
        await one.stream.submit(generate_request(1))
        with pytest.raises(PeerGone, match="went away"):
            await one.rest()


async def test_a_gap_ends_the_request():
    async with joined() as both:
        one = await both.running()
        one.outlet._num_sent += 1
        one.outlet.send(output(2))
        with pytest.raises(ProtocolViolation):
            await one.first()


async def test_another_process_at_the_same_address_is_not_taken_for_the_replica():
    """One that came after it on its port, or that is at the gateway's own loopback."""
    async with joined() as both, joined() as other:
        one = both.request()
        one.stream.follow(replace(both.decode.place, address=other.decode.address))
        with pytest.raises(PeerGone):
            await one.rest()


async def test_a_replica_can_not_speak_for_another_one():
    async with joined() as both, joined() as other:
        own, foreign = both.request(), other.request(both.client)
        own.follow()
        foreign.follow()
        with other.decode.tokens.open(own.stream.ticket) as forged:
            forged.send(output(666))
            foreign.outlet.send(output(1))
            assert await foreign.first() == output(1)  # what was sent before it is here, too
            own.outlet.send(output(2))
            assert await own.first() == output(2)


async def test_a_gateway_without_a_proper_id_is_refused():
    async with joined() as both:
        asked = pb.FollowRequest(gateway_id=b"short", server_id=both.decode.place.server_id)
        assert await refusal(both.decode.address, asked) is grpc.StatusCode.INVALID_ARGUMENT


async def test_no_more_gateways_than_can_be_are_listened_to(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_server, "MAX_GATEWAYS", 0)
    async with joined() as both:
        asked = pb.FollowRequest(gateway_id=b"g" * ID_BYTES, server_id=both.decode.place.server_id)
        assert await refusal(both.decode.address, asked) is grpc.StatusCode.RESOURCE_EXHAUSTED


@asynccontextmanager
async def half_open(both: Joined) -> AsyncIterator[tuple[Any, Callable[[], Any]]]:
    """Another connection of the gateway's, and its stream that decode believes it still has. What is returned with the
    one's stub opens the next stream by it, and waits until decode has given up the other."""
    async with grpc.aio.insecure_channel(both.decode.address) as channel, asyncio.timeout(10):
        stub: Any = WorkerServiceStub(channel)  # type: ignore[no-untyped-call, unused-ignore]
        asked = pb.FollowRequest(gateway_id=both.client._gateway_id, server_id=both.decode.place.server_id)
        lost = stub.Follow(asked)
        while not both.decode.tokens.num_gateways:
            await asyncio.sleep(0)

        async def follow() -> Any:
            call = stub.Follow(asked)
            await lost.code()
            return call

        yield stub, follow


@pytest.mark.parametrize("is_brought_first", [True, False])
async def test_a_request_that_was_opened_since_goes_on_with_the_gateways_next_stream(is_brought_first: bool):
    async with joined() as both, half_open(both) as (stub, follow):
        one = both.request()
        waiting = asyncio.create_task(one.outlet.request())
        brought = to_submit(one.stream.ticket, both.decode.place.server_id, generate_request(1))
        if is_brought_first:
            await stub.Submit(brought)
            await waiting
        async with one.outlet.unless_gone():
            call = await follow()
            if not is_brought_first:
                await stub.Submit(brought)
            assert await waiting == generate_request(1)
            one.outlet.send(output(1))
            [message] = (await call.read()).outputs
        assert message.key == one.stream.ticket.key
        call.cancel()


async def wait_on(outlet: Outlet, follow: Callable[[], Any]) -> None:
    async with outlet.unless_gone():
        await follow()
        await asyncio.Event().wait()


async def test_a_request_that_was_brought_before_ends_with_the_gateways_last_stream():
    async with joined() as both, half_open(both) as (_stub, follow):
        one = both.request()
        one.outlet.bring(generate_request(1), "another connection")
        with pytest.raises(PeerGone, match="has ended"):
            await wait_on(one.outlet, follow)


async def test_a_client_that_closes_leaves_no_channel_open_however_new(monkeypatch: pytest.MonkeyPatch):
    channels: list[grpc.aio.Channel] = []
    plain = token_client.open_channel
    monkeypatch.setattr(token_client, "open_channel", lambda *args: channels.append(plain(*args)) or channels[-1])  # type: ignore[func-returns-value]
    async with joined() as both:
        both.request().follow()
        await both.client.close()  # before its reader has begun
    [channel] = channels
    assert channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN


async def test_an_output_that_no_message_holds_ends_no_other_request():
    async with joined() as both:
        greedy, other = await both.running(), await both.running()
        with pytest.raises(RequestTooLarge, match="log-probabilities"):
            greedy.outlet.send(output(1, "x" * (2 << 20)))
        longest = output(1, "x" * (token_server.MAX_OUTPUT_BYTES - 100))
        other.outlet.send(longest)
        await other.outlet.end()
        assert await other.rest() == [longest]
