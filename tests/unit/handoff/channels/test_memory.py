from __future__ import annotations

import asyncio

import pytest

from shoal.errors import PeerGone
from shoal.handoff.channels.memory import memory_pair
from shoal.wire.handoff_messages import Beat, Claim, Envelope, Nack


def numbered(count: int) -> list[Envelope]:
    return [Envelope(1, Nack(bytes(16), seq)) for seq in range(count)]


async def test_envelopes_come_out_in_order_in_both_directions() -> None:
    ends = memory_pair()
    for sender, receiver in (ends, ends[::-1]):
        for envelope in numbered(3):
            await sender.send(envelope)
        assert [await receiver.receive() for _ in range(3)] == numbered(3)


async def test_what_was_sent_before_the_close_still_arrives() -> None:
    prefill, decode = memory_pair()
    await prefill.send(Envelope(1, Beat()))
    await prefill.close()
    await prefill.close()
    assert await decode.receive() == Envelope(1, Beat())
    for end in (prefill, decode):
        for _ in range(2):
            with pytest.raises(PeerGone):
                await end.receive()
        with pytest.raises(PeerGone):
            await end.send(Envelope(1, Beat()))


async def test_a_waiting_receiver_hears_of_the_close() -> None:
    prefill, decode = memory_pair()
    waiting = asyncio.ensure_future(decode.receive())
    await asyncio.sleep(0)
    await prefill.close()
    with pytest.raises(PeerGone):
        await waiting


async def test_a_rule_decides_about_one_direction_only() -> None:
    prefill, decode = memory_pair(prefill_sends=lambda envelope: (envelope,) * 2)
    await prefill.send(Envelope(1, Claim(bytes(16))))
    await decode.send(Envelope(2, Beat()))
    await decode.close()
    assert [await decode.receive() for _ in range(2)] == [Envelope(1, Claim(bytes(16)))] * 2
    assert await prefill.receive() == Envelope(2, Beat())
    with pytest.raises(PeerGone):
        await prefill.receive()
