"""Agents that are kept, since ending them may end the process."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
from transfer_helpers import needs_nixl

from shoal.errors import Unavailable
from shoal.handoff.carriers.nixl.agent import Agent, new_memory
from shoal.handoff.carriers.nixl.reader import Read, Reader, reader_bytes
from shoal.handoff.carriers.nixl.retired import Retired
from shoal.wire.handoff_messages import RemoteSegment

pytestmark = needs_nixl


def test_an_agent_whose_read_failed_is_never_ended_and_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX aborts the process that ends one while something of its broken connection is pending."""
    peer, memory = Agent(), new_memory(1 << 16)
    registered = peer.register(memory)
    segment = RemoteSegment(peer.metadata, registered.address, 1, 1 << 12, b"n" * 16)
    retired = Retired(1 << 30, lambda num_bytes: None)

    def ended_after(fails: bool) -> weakref.ref[object]:
        reader = Reader(segment, deadline_s=5.0, wake=lambda: None)
        retired.took(reader, reader_bytes(segment))
        agent, found = reader._agent, []
        assert agent is not None
        if fails:
            monkeypatch.setattr(agent, "read", _fail)
        reader.read(Read(0, 16, found.append))
        while not found:
            reader.poll(time.monotonic())
            peer.progress()
        assert (found == [None]) == fails
        found.clear()  # its buffer comes back
        retired.end(reader)
        return weakref.ref(agent._agent)

    first, second = ended_after(fails=False), ended_after(fails=True)
    gc.collect()
    assert first() is None
    assert second() is not None
    assert retired.has_room(0)
    monkeypatch.setattr(retired, "_num_kept", retired._num_kept + 31)
    assert not retired.has_room(0)
    peer.deregister(registered)


def _fail(*_: object) -> None:
    raise Unavailable("a peer that is gone")
