"""How many calls that need no key an address may have open: who takes more is in nobody else's way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.errors import Overloaded


class PeerCalls:
    """Up to ``most`` of each address at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open = Counter[str]()

    @contextmanager
    def counted(self, peer: str) -> Iterator[None]:
        """For the block; ``peer`` is gRPC's word for it, as ``ipv4:10.0.0.1:51234``. Raises Overloaded."""
        address = peer.rpartition(":")[0]
        if self._open[address] >= self._most:
            raise Overloaded(f"{self._most} calls of this address are open, as many as may: end one")
        self._open[address] += 1
        try:
            yield
        finally:
            self._open[address] -= 1
            self._open += Counter()  # keeps what is above 0
