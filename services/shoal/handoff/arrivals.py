"""What a session receives for its leases, each lease's frames in their order, also where payload is fetched first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from shoal.wire.handoff_messages import Chunk, Failed, Seal

LeaseFrame = Chunk | Seal | Failed


@dataclass(slots=True)
class _Arrival:
    frame: LeaseFrame
    is_here: bool


class Arrivals:
    """``deliver`` gets every frame once, when it's complete and all that came before it for its lease was delivered.

    A seal must not overtake the chunks that it counts. Leases don't wait for one another.
    """

    def __init__(self, deliver: Callable[[LeaseFrame], None]) -> None:
        self._deliver = deliver
        self._waiting: dict[bytes, deque[_Arrival]] = {}

    def add(self, frame: LeaseFrame) -> None:
        """A frame that is complete."""
        self._push(frame, is_here=True)
        self._drain(frame.lease_id)

    def expect(self, chunk: Chunk) -> Callable[[Chunk], None]:
        """A chunk whose payload is elsewhere; call what this returns with it once it's here."""
        return partial(self._arrived, self._push(chunk, is_here=False))

    def expects(self, lease_id: bytes, seq: int) -> bool:
        """This very chunk is on its way."""
        return any(chunk.seq == seq for chunk in self._chunks(lease_id))

    def num_waiting(self, lease_id: bytes) -> int:
        """Frames of the lease behind a payload that is on its way, and that one's."""
        return len(self._waiting.get(lease_id, ()))

    def num_bytes(self, lease_id: bytes) -> int:
        """Payload of the lease that is on its way, or here and behind one that is."""
        return sum(chunk.num_bytes for chunk in self._chunks(lease_id))

    def _chunks(self, lease_id: bytes) -> tuple[Chunk, ...]:
        waiting = self._waiting.get(lease_id, ())
        return tuple(arrival.frame for arrival in waiting if isinstance(arrival.frame, Chunk))

    def _push(self, frame: LeaseFrame, *, is_here: bool) -> _Arrival:
        arrival = _Arrival(frame, is_here)
        self._waiting.setdefault(frame.lease_id, deque()).append(arrival)
        return arrival

    def _arrived(self, arrival: _Arrival, chunk: Chunk) -> None:
        arrival.frame, arrival.is_here = chunk, True
        self._drain(chunk.lease_id)

    def _drain(self, lease_id: bytes) -> None:
        # Looked up each time: what is delivered may bring more.
        while (waiting := self._waiting.get(lease_id)) and waiting[0].is_here:
            frame = waiting.popleft().frame
            if not waiting:
                del self._waiting[lease_id]
            self._deliver(frame)
