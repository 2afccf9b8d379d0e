"""A server is asked over the wire: one that accepts and says nothing is found out, whatever its task looks like."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest
from role_certificates import YESTERDAY, Roles

from shoal.cluster.watch import LOOK_S
from shoal.wire import probe
from shoal.wire.certificates import name_of
from shoal.wire.options import HANDOFF_SERVER_OPTIONS
from shoal.wire.peers import PeerTls, RoleGate
from shoal.wire.ports import bind_first_free
from shoal.wire.probe import MAX_UNANSWERED, PATIENCE_S, PAUSE_S, RETRY_S, ProbedServer

WITHIN_S = 5.0
LIMIT_S = 20.0


@dataclass
class Task:
    """What a server says of itself."""

    is_serving: bool = True


class Count(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """How often the server was asked for anything."""

    num_asked = 0

    async def intercept_service(self, continuation, details):  # type: ignore[no-untyped-def]
        self.num_asked += 1
        return await continuation(details)


@asynccontextmanager
async def probed(address: str, tls: PeerTls | None = None, task: Task | None = None) -> AsyncIterator[ProbedServer]:
    server = ProbedServer(task or Task(), address, tls)
    try:
        yield server
    finally:
        await server.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def started(port: int, credentials: grpc.ServerCredentials | None = None, *gates: RoleGate) -> grpc.aio.Server:
    server = grpc.aio.server(interceptors=gates, options=HANDOFF_SERVER_OPTIONS)
    assert bind_first_free(server, "127.0.0.1", port, port, credentials) == port
    await server.start()
    return server


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is waited for but the server."""
    monkeypatch.setattr(probe, "PAUSE_S", 0.01)
    monkeypatch.setattr(probe, "RETRY_S", 0.01)


def test_it_is_found_out_within_five_seconds() -> None:
    found_s = PAUSE_S + MAX_UNANSWERED * PATIENCE_S + (MAX_UNANSWERED - 1) * RETRY_S
    assert found_s + LOOK_S + 1.0 < WITHIN_S, "the watch looks, and the gateway may hear of it a second later"


async def test_a_listener_that_accepts_and_never_answers_does_not_serve() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system accepts, and nobody reads
        async with probed(f"127.0.0.1:{silent.getsockname()[1]}") as server:
            assert server.is_serving
            await until(lambda: not server.is_serving)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("offset_s", [-3600.0, 3600.0])
async def test_a_wall_clock_that_jumps_is_no_silence(
    free_port: int, monkeypatch: pytest.MonkeyPatch, offset_s: float
) -> None:
    seen = Count()
    server = grpc.aio.server(interceptors=(seen,), options=HANDOFF_SERVER_OPTIONS)
    assert bind_first_free(server, "127.0.0.1", free_port, free_port, None) == free_port
    await server.start()
    own_s = time.time
    async with probed(f"127.0.0.1:{free_port}") as probing:
        await until(lambda: seen.num_asked > 0)
        monkeypatch.setattr(time, "time", lambda: own_s() + offset_s)
        before = seen.num_asked
        await until(lambda: seen.num_asked > before + 5 or not probing.is_serving)
        assert probing.is_serving
    await server.stop(0)


@pytest.mark.usefixtures("at_once")
async def test_a_server_whose_calls_hang_does_not_serve_until_they_go_on(free_port: int) -> None:
    """Its connection is there, and its transport answers pings; what hangs is behind it."""
    hangs, goes_on = asyncio.Event(), asyncio.Event()

    class Wedge(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
        async def intercept_service(self, continuation, details):  # type: ignore[no-untyped-def]
            if hangs.is_set():
                await goes_on.wait()
            return await continuation(details)

    listener = grpc.aio.server(interceptors=(Wedge(),), options=HANDOFF_SERVER_OPTIONS)
    assert bind_first_free(listener, "127.0.0.1", free_port, free_port) == free_port
    await listener.start()
    async with probed(f"127.0.0.1:{free_port}") as server:
        server._num_unanswered = 1
        await until(lambda: server._num_unanswered == 0)  # it has answered
        hangs.set()
        await until(lambda: not server.is_serving)
        goes_on.set()
        await until(lambda: server.is_serving)
    await listener.stop(None)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("by_tls", [False, True])
async def test_a_server_that_is_gone_and_comes_again_is_noticed_both_times(
    free_port: int, tmp_path: Path, by_tls: bool
) -> None:
    """By TLS it comes as decode, which is refused and so answered."""
    tls = PeerTls(Roles(tmp_path).folder, "decode") if by_tls else None
    async with probed(f"127.0.0.1:{free_port}", tls) as server:
        await until(lambda: not server.is_serving)
        listener = await started(free_port, tls and tls.server_credentials(), *[RoleGate()] * by_tls)
        await until(lambda: server.is_serving)
        await listener.stop(None)
        await until(lambda: not server.is_serving)


@pytest.mark.usefixtures("at_once")
async def test_a_certificate_that_has_expired_is_no_reason_to_replace_a_server(free_port: int, tmp_path: Path) -> None:
    roles = Roles(tmp_path)
    async with probed(f"127.0.0.1:{free_port}", PeerTls(roles.folder, "decode")) as server:
        await until(lambda: not server.is_serving)
        listener = await started(free_port, roles.server_credentials(name_of("decode"), YESTERDAY))
        await until(lambda: server.is_serving)
        await listener.stop(None)


@pytest.mark.usefixtures("at_once")
async def test_certificates_that_are_replaced_are_what_it_shows_next(free_port: int, tmp_path: Path) -> None:
    roles, others = Roles(tmp_path / "one"), Roles(tmp_path / "other")
    seen = Count()
    listener = grpc.aio.server(interceptors=(seen,), options=HANDOFF_SERVER_OPTIONS)
    credentials = others.server_credentials(name_of("decode"))
    assert bind_first_free(listener, "127.0.0.1", free_port, free_port, credentials) == free_port
    await listener.start()
    async with probed(f"127.0.0.1:{free_port}", PeerTls(roles.folder, "decode")) as server:
        server._num_unanswered = 1
        await until(lambda: server._num_unanswered == 0)  # it was told that nobody trusts it
        assert seen.num_asked == 0 and server.is_serving
        roles.renew(others)
        await until(lambda: seen.num_asked > 1)
        assert server.is_serving
    await listener.stop(None)


async def test_a_server_that_says_itself_that_it_has_ended_is_believed(free_port: int) -> None:
    listener = await started(free_port)
    task = Task()
    async with probed(f"127.0.0.1:{free_port}", task=task) as server:
        assert server.is_serving
        task.is_serving = False
        assert not server.is_serving
    await server.close()
    await listener.stop(None)
