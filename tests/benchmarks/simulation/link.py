"""What K/V travel by: a replica's way out, and a replica's way in."""

from __future__ import annotations


class Link:
    """One direction of one replica's connection, first in, first out."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self.num_bytes = 0
        """Carried, or about to be."""

    def occupy(self, num_bytes: int, from_s: float) -> tuple[float, float]:
        """When ``num_bytes``, which are there at ``from_s`` at the earliest, begin and have passed."""
        began_s = max(from_s, self._free_s)
        self._free_s = began_s + num_bytes / self._bytes_per_s
        self.num_bytes += num_bytes
        return began_s, self._free_s


def send(num_bytes: int, out: Link, into: Link, now_s: float) -> tuple[float, float]:
    """When ``num_bytes`` have left, and when they have arrived. What flows out flows in at once, if the way in is free.

    What waits before the way in doesn't hold up the way out: the receiver takes it into memory of its own.
    """
    began_s, left_s = out.occupy(num_bytes, now_s)
    _, arrived_s = into.occupy(num_bytes, began_s)
    return left_s, max(left_s, arrived_s)
