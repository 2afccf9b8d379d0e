"""Streams that break, and peers that aren't who they should be: requests end, each with an error, and no others do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from token_streams import Joined, Request, generate_request, joined, output

from shoal.errors import InternalError, PeerGone, ProtocolViolation, RequestTooLarge, Unauthenticated, Unavailable
from shoal.v1 import worker_pb2 as pb
from shoal.v1.worker_pb2_grpc import WorkerServiceStub
from shoal.wire import token_client, token_server
from shoal.wire.messages import Resumption, SentChoice
from shoal.wire.requests import to_submit
from shoal.wire.token_server import ID_BYTES, Outlet
from shoal.wire.values import MAX_ID


async def ended(one: Request) -> None:
    """Decode has stopped to work for it."""
    async with asyncio.timeout(10):
        while one.running.is_open:
            await asyncio.sleep(0)


@asynccontextmanager
async def stranger(address: str) -> AsyncIterator[Any]:
    own_connection = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(address, own_connection) as channel, asyncio.timeout(10):
        yield WorkerServiceStub(channel)  # type: ignore[no-untyped-call, unused-ignore]


async def refused(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code()


def submitted(both: Joined, key: int = 7, **changes: Any) -> pb.SubmitRequest:
    """A request of this gateway, with some of its fields changed."""
    message = to_submit(both.client._gateway_id, key, both.decode.place.server_id, generate_request(1))
    for name in changes:
        message.ClearField(name)
    message.MergeFrom(pb.SubmitRequest(**changes))
    return message


async def test_a_replica_that_goes_away_ends_its_requests_and_no_others():
    async with joined() as both, joined() as other:
        lost, kept = await both.running(), await other.request(both.client)
        await both.decode.vanish()
        with pytest.raises(PeerGone, match="went away"):
            await lost.first()
        kept.outlet.send(output(1))
        kept.end()
        assert await kept.rest() == [output(1)]


async def test_a_replica_that_is_not_there_ends_the_request():
    async with joined() as both:
        stream, _ = both.open(place=replace(both.decode.place, address="127.0.0.1:1"))
        with pytest.raises(PeerGone, match=r"^the decode replica went away$"):  # and no address, which gRPC would say
            await anext(stream)


async def test_who_is_not_trusted_is_not_called_dead(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """Clients and operators are told apart what it is: one to ask again, the other which address to look at."""
    monkeypatch.setattr(token_client, "refusal", lambda _error, of: Unauthenticated(f"{of} shows no certificate"))
    async with joined() as both:
        stream, call = both.open(place=replace(both.decode.place, address="127.0.0.1:1"))
        with pytest.raises(PeerGone, match="don't trust each other"):
            await anext(stream)
        await call
        while both.client._readers:
            await asyncio.sleep(0)
    assert caplog.text.count("127.0.0.1:1 shows no certificate") == 1


async def test_a_gateway_that_goes_away_ends_its_requests_on_decode():
    async with joined() as both:
        one, quiet = await both.running(), await both.request()  # one may wait, and have no output to send
        await both.client.close()
        await ended(one)
        await ended(quiet)


async def test_a_server_that_closes_ends_all_streams():
    async with joined() as both:
        one = await both.running()
        both.decode.tokens.close()
        with pytest.raises(PeerGone):
            one.outlet.send(output(1))
        with pytest.raises(PeerGone):
            await one.first()
        await ended(one)


async def test_after_a_lost_stream_the_next_request_gets_a_new_one():
    async with joined() as both:
        first = await both.running()
        await both.client.close()
        await ended(first)
        await both.running()


async def test_a_request_for_another_process_is_refused():
    async with joined() as both, stranger(both.decode.address) as stub:
        asked = submitted(both, server_id=b"s" * ID_BYTES)
        assert await refused(stub.Submit(asked)) is grpc.StatusCode.UNAVAILABLE


async def test_another_process_at_the_same_address_is_not_taken_for_the_replica():
    """One that came after it on its port, or that is at the gateway's own loopback."""
    async with joined() as both, joined() as other:
        stream, _ = both.open(place=replace(both.decode.place, address=other.decode.address))
        with pytest.raises(PeerGone):
            await anext(stream)


async def test_a_request_is_taken_once():
    """What is sent twice doesn't change what runs."""
    async with joined() as both, stranger(both.decode.address) as stub:
        one = await both.running()
        asked = submitted(both, one.stream.key)
        assert await refused(stub.Submit(asked)) is grpc.StatusCode.INVALID_ARGUMENT
        one.outlet.send(output(1))
        assert await one.first() == output(1)


async def test_a_malformed_request_ends_it_with_what_is_wrong(monkeypatch: pytest.MonkeyPatch):
    async with joined() as both:
        wrong = submitted(both, prompt_token_ids=[MAX_ID + 1])
        monkeypatch.setattr(token_client, "to_submit", lambda *_: wrong)
        stream, _ = both.open()
        with pytest.raises(ProtocolViolation, match="prompt_token_ids"):
            await anext(stream)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prompt_token_ids": (MAX_ID,) * (1 << 19)}, RequestTooLarge),
        # What the client asked for was no larger than allowed, and may be asked for again.
        ({"resumption": Resumption("plan", (SentChoice((MAX_ID,) * (1 << 19)),))}, Unavailable),
    ],
    ids=["prompt", "answer"],
)
async def test_a_request_that_no_message_holds_is_refused(changes: dict[str, Any], error: type[Exception]):
    async with joined() as both:
        with both.client.open() as stream:
            await stream.run(both.decode.place, replace(generate_request(1), **changes))
            with pytest.raises(error, match="too many tokens"):
                await anext(stream)


async def test_a_long_prompt_fits():
    long = generate_request(*range(130_000, 130_000 + (1 << 17)))
    async with joined() as both:
        with both.client.open() as stream:
            call = asyncio.create_task(stream.run(both.decode.place, long))
            assert (await both.decode.came.get()).request == long
            call.cancel()


async def test_a_defect_leaves_as_one_and_says_nothing(caplog: pytest.LogCaptureFixture):
    async with joined() as both:
        one = await both.running()
        one.running.end.set_exception(ValueError("secret"))
        with pytest.raises(InternalError) as caught:
            await one.rest()
    assert "secret" not in str(caught.value) and "secret" in caplog.text


async def test_an_answer_whose_end_does_not_arrive_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_client, "ARRIVE_S", 0.01)
    async with joined() as both:
        one = await both.running()
        monkeypatch.setattr(one.stream, "accept", lambda _message: None)
        one.end()
        with pytest.raises(PeerGone, match="didn't arrive"):
            await one.rest()


async def test_a_gateway_that_never_comes_to_listen_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch):
    async def end_soon(_request: Any, outlet: Outlet) -> None:
        outlet.send(output(0))
        with pytest.raises(PeerGone, match="come to listen"):
            await outlet.end(timeout_s=0.01)
        raise PeerGone("it didn't come")

    async with joined(answer=end_soon) as both, stranger(both.decode.address) as stub:
        assert await refused(stub.Submit(submitted(both))) is grpc.StatusCode.UNAVAILABLE


async def test_a_gap_ends_the_request():
    async with joined() as both:
        one = await both.running()
        one.outlet._num_sent += 1
        one.outlet.send(output(2))
        with pytest.raises(ProtocolViolation):
            await one.first()


async def test_a_replica_can_not_speak_for_another_one():
    async with joined() as both, joined() as other:
        own = await both.running()
        foreign = await other.request(both.client)
        async with stranger(other.decode.address) as stub:
            forging = stub.Submit(replace_key(other, both, own.stream.key))
            forged = await other.decode.came.get()
            forged.outlet.send(output(666))
            foreign.outlet.send(output(1))
            assert await foreign.first() == output(1)  # what was sent before it is here, too
            own.outlet.send(output(2))
            assert await own.first() == output(2)
            forging.cancel()


def replace_key(other: Joined, both: Joined, key: int) -> pb.SubmitRequest:
    """A request at the ``other`` replica by a name that the gateway has for one elsewhere."""
    return to_submit(both.client._gateway_id, key, other.decode.place.server_id, generate_request(1))


async def test_a_gateway_without_a_proper_id_is_refused():
    async with joined() as both, stranger(both.decode.address) as stub:
        asked = pb.FollowRequest(gateway_id=b"short", server_id=both.decode.place.server_id)
        assert await refused(stub.Follow(asked).read()) is grpc.StatusCode.INVALID_ARGUMENT
        assert await refused(stub.Submit(submitted(both, gateway_id=b"short"))) is grpc.StatusCode.INVALID_ARGUMENT


async def test_no_more_gateways_than_can_be_are_listened_to(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_server, "MAX_GATEWAYS", 0)
    async with joined() as both, stranger(both.decode.address) as stub:
        asked = pb.FollowRequest(gateway_id=b"g" * ID_BYTES, server_id=both.decode.place.server_id)
        assert await refused(stub.Follow(asked).read()) is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("comes_before", [True, False], ids=["came by the lost connection", "came since"])
async def test_of_a_gateway_that_lost_its_stream_those_requests_go_on_that_came_since(comes_before: bool):
    """Decode may not have heard yet that the stream is lost."""
    async with joined() as both, stranger(both.decode.address) as old, stranger(both.decode.address) as new:
        asked = pb.FollowRequest(gateway_id=both.client._gateway_id, server_id=both.decode.place.server_id)
        lost = old.Follow(asked)
        while not both.decode.tokens.num_gateways:
            await asyncio.sleep(0)
        call = (old if comes_before else new).Submit(submitted(both))
        running = await both.decode.came.get()
        await lost.read()  # that it's accepted
        following = new.Follow(asked)
        await lost.code()
        if comes_before:
            assert await refused(call) is grpc.StatusCode.UNAVAILABLE
            assert not running.is_open
        else:
            running.outlet.send(output(1))
            seen = [one async for one in first_outputs(following)]
            assert [one.token_ids for one in seen] == [[1]]
        call.cancel()
        following.cancel()


async def first_outputs(following: Any) -> AsyncIterator[pb.Output]:
    """Of the first message that has any beside the word that a request was accepted."""
    while True:
        outputs = [one for one in (await following.read()).outputs if not one.is_accepted]
        for one in outputs:
            yield one
        if outputs:
            return


async def test_a_client_that_closes_leaves_no_channel_open_however_new(monkeypatch: pytest.MonkeyPatch):
    channels: list[grpc.aio.Channel] = []
    plain = token_client.open_channel
    monkeypatch.setattr(token_client, "open_channel", lambda *args: channels.append(plain(*args)) or channels[-1])  # type: ignore[func-returns-value]
    async with joined() as both:
        both.open()
        await asyncio.sleep(0)
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
        other.end()
        assert await other.rest() == [longest]
