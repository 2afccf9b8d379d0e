"""Whether Ray's daemons live: the raylet of a cluster that others started, too."""

from __future__ import annotations

import socket
from pathlib import Path

from shoal.cluster.daemons import Daemons


def test_the_raylet_lives_until_its_socket_ends(tmp_path: Path) -> None:
    path = str(tmp_path / "raylet")
    with socket.socket(socket.AF_UNIX) as raylet:
        raylet.bind(path)
        raylet.listen()
        daemons = Daemons()
        daemons.watch(path)
        assert daemons.raylet_lives()
        connection, _ = raylet.accept()
        assert daemons.raylet_lives()
        connection.close()
        assert not daemons.raylet_lives()
        daemons.close()
        daemons.close()
    assert not daemons.raylet_lives()


def test_without_a_ray_of_this_process_nothing_lives(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as raylet:
        raylet.bind(str(tmp_path / "raylet"))
        raylet.listen()
        daemons = Daemons()
        daemons.watch(str(tmp_path / "raylet"))
        assert not daemons.live()
        daemons.close()
