"""What decode sends arrives at the gateway: all of it, in order, and with whom it is for."""

from __future__ import annotations

import asyncio

import pytest
from token_streams import generate_request, joined, output

from shoal.errors import PeerGone
from shoal.wire.messages import Ticket, TokenLogprob, TokenOutput
from shoal.wire.token_client import TokenClient
from shoal.wire.token_server import ID_BYTES, TokenServer


async def test_outputs_arrive_in_order_and_then_the_end():
    async with joined() as both:
        one = both.request()
        one.outlet.send(output(0))  # before anybody listens
        one.follow()
        for number in range(1, 100):
            one.outlet.send(output(number))
        await one.outlet.end()
        assert await one.rest() == [output(number) for number in range(100)]


async def test_requests_share_a_stream_and_get_their_own():
    async with joined() as both:
        several = [both.request() for _ in range(5)]
        for index, one in enumerate(several):
            one.follow()
            one.outlet.send(output(index))
            await one.outlet.end()
        assert [await one.rest() for one in several] == [[output(index)] for index in range(5)]
        assert len(both.client._stubs) == 1


async def test_a_replica_is_heard_of_as_its_outputs_arrive_however_late_they_are_read():
    told: asyncio.Queue[Ticket] = asyncio.Queue()
    async with joined() as both:
        gateway = TokenClient(60, told.put_nowait)
        one, other = both.request(gateway), both.request(gateway)
        one.follow()
        for number in range(2):  # a message each
            one.outlet.send(output(number))
            assert await asyncio.wait_for(told.get(), 10) is one.stream.ticket
        assert [await one.first() for _ in range(2)] == [output(0), output(1)]
        for request in (one, other):  # one message, the first of the other
            request.outlet.send(output(2))
        assert [await asyncio.wait_for(told.get(), 10) for _ in range(2)] == [one.stream.ticket, other.stream.ticket]
        assert told.empty()
        both.held.close()
        await gateway.close()


async def test_a_message_stays_below_what_a_channel_takes():
    async with joined() as both:
        one = both.request()
        told = tuple(TokenLogprob(1, "word" * 8, -1.0, ((1, "word" * 8, -1.0),) * 200) for _ in range(2048))
        one.follow()
        one.outlet.send(TokenOutput(0, (1,), "", prompt_logprobs=told))
        await one.outlet.end()
        (arrived,) = await one.rest()
        assert arrived.prompt_logprobs == told


async def test_outputs_of_a_request_that_was_given_up_are_dropped():
    async with joined() as both:
        with both.client.open() as given_up:
            outlet = both.held.enter_context(both.decode.tokens.open(given_up.ticket))
            given_up.follow(both.decode.place)
        one = both.request()
        one.follow()
        outlet.send(output(9))
        one.outlet.send(output(1))
        await one.outlet.end()
        assert await one.rest() == [output(1)]


async def test_a_request_that_is_complete_waits_for_its_gateway():
    """The first one at a replica may be done before the stream is there."""
    async with joined() as both:
        one = both.request()
        one.outlet.send(output(0))
        ending = asyncio.create_task(one.outlet.end())
        await asyncio.sleep(0)  # let it begin
        assert not ending.done()
        one.follow()
        await ending
        assert await one.rest() == [output(0)]


async def test_a_request_comes_to_the_call_that_waits_for_it():
    async with joined() as both:
        several = [both.request() for _ in range(5)]
        waiting = [asyncio.create_task(one.outlet.request()) for one in several]
        for index, one in reversed(list(enumerate(several))):
            one.follow()
            await one.stream.submit(generate_request(index))
        assert await asyncio.gather(*waiting) == [generate_request(index) for index in range(5)]


async def test_a_long_prompt_fits():
    long = generate_request(*range(130_000, 130_000 + (1 << 17)))
    async with joined() as both:
        one = both.request()
        one.follow()
        await one.stream.submit(long)
        assert await one.outlet.request() == long


async def test_a_request_that_never_comes_is_not_waited_for_for_ever():
    async with joined() as both:
        one = await both.running()
        with pytest.raises(PeerGone, match="bring the request"):
            await one.outlet.request(timeout_s=0.01)


async def test_a_gateway_that_never_comes_is_not_waited_for_for_ever():
    tokens = TokenServer()
    with tokens.open(Ticket(b"g" * ID_BYTES, 1)) as outlet:
        outlet.send(output(0))
        assert tokens.num_gateways == 1
        with pytest.raises(PeerGone, match="come to listen"):
            await outlet.end(timeout_s=0.01)
    assert tokens.num_gateways == 0
