"""What is shipped for the skipped layers: agreed on once for a session, and nothing else is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_clock import FakeClock
from kv_prompts import NUM_LAYERS, NUM_SHALLOW, PLAN, STATE_BYTES, lease_id, prompt
from raw_peer import RawPeer, chunk
from transfer_helpers import MAX_FRAME_BYTES, rig

from shoal.errors import HandoffError, PlanMismatch, ProtocolViolation
from shoal.handoff.base import crc32c
from shoal.handoff.channels.memory import memory_pair
from shoal.handoff.prefill_side import PrefillSession
from shoal.handoff.session import PROTOCOL_VERSION, Identity
from shoal.handoff.terms import KvShape
from shoal.wire.handoff_messages import Accepted, Carrier, Chunk, Claim, Hello, WireMode

KV, HIDDEN = WireMode.KV, WireMode.HIDDEN
BOTH = (KV, HIDDEN)
DEEP = KvShape("plan", num_layers=30, num_shallow_layers=20, token_layer_bytes=100, state_bytes=300)
ONE_DEEP = replace(DEEP, num_shallow_layers=29)


@pytest.mark.parametrize(
    ("shape", "wanted", "known", "carrier", "chosen"),
    [
        (DEEP, BOTH, BOTH, Carrier.SHM, KV),  # nothing is won by fewer bytes within a host
        (DEEP, BOTH, BOTH, Carrier.INLINE, HIDDEN),
        (ONE_DEEP, BOTH, BOTH, Carrier.INLINE, KV),  # K/V of one layer are fewer bytes than the state
        (DEEP, (KV,), BOTH, Carrier.INLINE, KV),
        (DEEP, (HIDDEN,), BOTH, Carrier.SHM, HIDDEN),
        (DEEP, BOTH, (KV,), Carrier.INLINE, KV),
    ],
)
def test_which_mode_a_pair_has(
    shape: KvShape, wanted: tuple[WireMode, ...], known: tuple[WireMode, ...], carrier: Carrier, chosen: WireMode
) -> None:
    assert shape.choose_wire_mode(wanted, known, carrier) is chosen


def test_no_mode_in_common_is_named() -> None:
    with pytest.raises(PlanMismatch, match="no wire mode in common: hidden here, kv at the peer"):
        DEEP.choose_wire_mode((HIDDEN,), (KV,), Carrier.INLINE)


def states(new_id: bytes, seq: int, tokens: tuple[int, int], **changes: object) -> Chunk:
    payload = bytes(STATE_BYTES * (tokens[1] - tokens[0]))
    fields = {"crc32c": crc32c(payload), "payload": payload, "wire_mode": HIDDEN} | changes
    return replace(chunk(new_id, seq, tokens, (NUM_SHALLOW, NUM_LAYERS)), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("memory", states(b"", 0, (0, 40)), "brings hidden of layers .* kv was agreed on"),
        ("memory+hidden", chunk(b"", 0, (0, 10), (NUM_SHALLOW, NUM_LAYERS)), "brings kv of .* hidden was agreed on"),
        ("memory+hidden", chunk(b"", 0, (0, 10)), "brings kv of layers"),
        ("memory+hidden", states(b"", 0, (0, 40), layer_start=0), "for all skipped ones"),
        ("memory+hidden", states(b"", 0, (0, 40), layer_start=0, layer_end=NUM_SHALLOW), "brings hidden of layers"),
        ("memory+hidden", states(b"", 0, (0, 39), token_end=40), "has .* bytes where its ranges need"),
    ],
)
async def test_what_was_not_agreed_on_ends_the_lease(kind: str, wrong: Chunk, message: str) -> None:
    async with rig(kind) as both:
        peer = RawPeer(await both.connect(both.address))
        await peer.greet()
        new_id = lease_id()
        async with both.open(new_id, prompt()) as lease:
            await peer.send(Claim(new_id))
            await peer.expect(Accepted)
            await peer.send(replace(wrong, lease_id=new_id))
            with pytest.raises(ProtocolViolation, match=message):
                await lease.arrived()
        await peer.channel.close()


async def test_states_twice_are_refused() -> None:
    async with rig("memory+hidden") as both:
        peer = RawPeer(await both.connect(both.address))
        await peer.greet()
        new_id = lease_id()
        async with both.open(new_id, prompt()) as lease:
            await peer.send(Claim(new_id))
            await peer.expect(Accepted)
            await peer.send(states(new_id, 0, (0, 20)), states(new_id, 1, (19, 40)))
            with pytest.raises(HandoffError, match="overlap"):
                await lease.arrived()
        await peer.channel.close()


async def test_prefill_refuses_a_decode_that_leaves_it_open() -> None:
    prefill, other = memory_pair()
    decode = RawPeer(other)
    await decode.send(Hello(PROTOCOL_VERSION, (PLAN,), BOTH))
    identity = Identity(5, (PLAN,), BOTH, peer="prefill")
    with pytest.raises(ProtocolViolation, match="decode wants 2 wire modes, not one"):
        await PrefillSession.open(prefill, identity, ttl_s=5.0, max_frame_bytes=MAX_FRAME_BYTES, clock=FakeClock())
