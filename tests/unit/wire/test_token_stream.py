"""What decode sends arrives at the gateway: all of it, in order, and with whom it is for."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from token_streams import generate_request, joined, output

from shoal.errors import Overloaded, PeerGone
from shoal.wire import token_server
from shoal.wire.messages import TokenLogprob, TokenOutput


async def test_outputs_arrive_in_order_and_then_the_end():
    async with joined() as both:
        one = await both.request()
        for number in range(100):
            one.outlet.send(output(number))
        one.end()
        assert await one.rest() == [output(number) for number in range(100)]
        await one.call


async def test_requests_share_a_stream_and_get_their_own():
    async with joined() as both:
        several = [await both.request() for _ in range(5)]
        for index, one in enumerate(several):
            one.outlet.send(output(index))
            one.end()
        assert [await one.rest() for one in several] == [[output(index)] for index in range(5)]
        assert len(both.client._stubs) == 1


async def test_what_a_step_brings_is_one_message(monkeypatch: pytest.MonkeyPatch):
    async with joined() as both:
        several = [await both.running() for _ in range(8)]
        sizes: list[int] = []
        plain = token_server._batches

        def counting(outputs: Any) -> Any:
            for batch in plain(outputs):
                sizes.append(len(batch))
                yield batch

        monkeypatch.setattr(token_server, "_batches", counting)
        for one in several:
            one.outlet.send(output(1))
        await asyncio.gather(*(one.first() for one in several))
        assert sizes == [8]


async def test_a_replica_is_heard_of_when_it_has_a_request_and_as_outputs_arrive_however_late_they_are_read():
    told: asyncio.Queue[str] = asyncio.Queue()
    async with joined() as both:
        with both.client.open(partial(told.put_nowait, "accepted"), partial(told.put_nowait, "heard")) as stream:
            call = asyncio.create_task(stream.run(both.decode.place, generate_request(1)))
            running = await both.decode.came.get()
            assert await asyncio.wait_for(told.get(), 10) == "accepted"
            for number in range(2):  # a message each
                running.outlet.send(output(number))
                assert await asyncio.wait_for(told.get(), 10) == "heard"
            running.end.set_result(None)
            assert [one async for one in stream] == [output(0), output(1)]
            await call


async def test_a_message_stays_below_what_a_channel_takes():
    async with joined() as both:
        one = await both.request()
        told = tuple(TokenLogprob(1, "word" * 8, -1.0, ((1, "word" * 8, -1.0),) * 200) for _ in range(2048))
        one.outlet.send(TokenOutput(0, (1,), "", prompt_logprobs=told))
        one.end()
        (arrived,) = await one.rest()
        assert arrived.prompt_logprobs == told


async def test_outputs_of_a_request_that_was_given_up_are_dropped():
    async with joined() as both:
        with both.client.open() as given_up:
            call = asyncio.create_task(given_up.run(both.decode.place, generate_request(1)))
            running = await both.decode.came.get()
        one = await both.request()
        running.outlet.send(output(9))
        one.outlet.send(output(1))
        one.end()
        assert await one.rest() == [output(1)]
        call.cancel()


async def test_a_gateway_that_gives_up_ends_the_request_at_decode():
    async with joined() as both:
        one = await both.request()
        one.call.cancel()
        async with asyncio.timeout(10):
            while one.running.is_open:
                await asyncio.sleep(0)


async def test_what_decode_raises_is_what_the_answer_ends_with():
    async with joined() as both:
        one = await both.running()
        one.running.end.set_exception(Overloaded("full", retry_after_s=3.0))
        with pytest.raises(Overloaded, match="full") as refused:
            await one.rest()
    assert refused.value.retry_after_s == 3.0


async def test_a_replica_that_drains_says_so_finishes_what_it_has_and_then_takes_no_more():
    async with joined() as both:
        one = await both.running()
        draining = asyncio.create_task(both.decode.tokens.drain(60))
        async with asyncio.timeout(10):
            while not both.client.draining:
                await asyncio.sleep(0)
        assert both.client.draining == {both.decode.place.server_id}
        late = await both.request()  # it was on its way
        for request in (one, late):
            request.outlet.send(output(1))
            request.end()
            assert await request.rest() == [output(1)]
        await draining
        stream, _ = both.open()
        with pytest.raises(PeerGone):
            await anext(stream)


async def test_a_replica_does_not_drain_for_ever():
    async with joined() as both:
        one = await both.running()
        await both.decode.tokens.drain(0.01)
        assert one.running.is_open


async def test_a_connection_may_take_a_while():
    async with joined() as both:
        slow = await asyncio.start_server(partial(_forward_late, both.decode.address), "127.0.0.1", 0)
        async with slow:
            port = slow.sockets[0].getsockname()[1]
            one = await both.request(place=replace(both.decode.place, address=f"127.0.0.1:{port}"))
            one.outlet.send(output(0))
            one.end()
            assert await one.rest() == [output(0)]
            await both.client.close()


async def _forward_late(address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.3)  # the network's delay: longer than gRPC gives a connection by itself
    host, port = address.rsplit(":", 1)
    far_reader, far_writer = await asyncio.open_connection(host, int(port))

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        target.close()

    await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))
