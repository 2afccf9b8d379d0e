"""Ray's daemons on this machine, and whether they live: Ray itself says so only to those who ask."""

from __future__ import annotations

import socket
from typing import Any

from shoal.errors import Unavailable


class Daemons:
    """Of this process' Ray node, within ``ray.init`` and ``ray.shutdown``. Closing twice is a no-op."""

    def __init__(self) -> None:
        self._raylet = socket.socket(socket.AF_UNIX)

    def watch(self, raylet_socket: str | None = None) -> None:
        """Over a connection on which nothing is said, and which ends with the raylet. By default that of our node.

        One of a cluster that was joined is no child of this process, so Ray doesn't watch it for us.
        """
        self._raylet.connect(raylet_socket or _node().raylet_socket_name)
        self._raylet.setblocking(False)

    def live(self) -> bool:
        """Whether the raylet lives, and every other process that Ray started from here."""
        node = _node()
        return node is not None and not node.dead_processes() and self.raylet_lives()

    def require_live(self) -> None:
        """Raises Unavailable unless they live."""
        if not self.live():
            raise Unavailable("Ray has ended: one of its processes was killed; start again")

    def raylet_lives(self) -> bool:
        try:
            return bool(self._raylet.recv(1))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        self._raylet.close()


def _node() -> Any:
    from ray._private import worker

    return worker._global_node
