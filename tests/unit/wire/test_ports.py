from __future__ import annotations

import random
import socket

import grpc.aio
import pytest

from shoal.errors import ConfigError
from shoal.wire.options import HANDOFF_SERVER_OPTIONS
from shoal.wire.ports import bind_first_free


def free_pair() -> int:
    """The first of two neighbouring ports of which both were free a moment ago, where nobody else looks for any."""
    for first in random.sample(range(20000, 21000, 2), 20):
        try:
            with socket.create_server(("127.0.0.1", first)), socket.create_server(("127.0.0.1", first + 1)):
                return first
        except OSError:
            continue
    raise RuntimeError("no two free ports on this machine")


async def test_servers_take_one_port_each_until_the_range_is_empty() -> None:
    first = free_pair()
    servers = [grpc.aio.server(options=HANDOFF_SERVER_OPTIONS) for _ in range(3)]
    try:
        ports = [bind_first_free(server, "127.0.0.1", first, first + 1) for server in servers[:2]]
        assert ports == [first, first + 1]
        with pytest.raises(ConfigError, match=rf"no free port in {first}\.\.{first + 1} on 127\.0\.0\.1"):
            bind_first_free(servers[2], "127.0.0.1", first, first + 1)
    finally:
        for server in servers:
            await server.stop(None)


async def test_a_port_that_another_program_holds_is_passed_over() -> None:
    first = free_pair()
    server = grpc.aio.server(options=HANDOFF_SERVER_OPTIONS)
    with socket.create_server(("127.0.0.1", first)):
        assert bind_first_free(server, "127.0.0.1", first, first + 1) == first + 1
    await server.stop(None)


async def test_an_address_of_another_machine_is_refused_at_once() -> None:
    server = grpc.aio.server(options=HANDOFF_SERVER_OPTIONS)
    with pytest.raises(ConfigError, match=r"can't listen on 203\.0\.113\.9"):
        bind_first_free(server, "203.0.113.9", 1024, 65535)
    await server.stop(None)
