"""Decode's hand-off server: one session for every channel that prefill opens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc.aio

from shoal.errors import InternalError, ShoalError, Unavailable
from shoal.handoff.base import Channel
from shoal.handoff.channels.grpc import add_handoff_service
from shoal.handoff.channels.memory import memory_pair
from shoal.handoff.decode_session import Attach, DecodeSession
from shoal.handoff.decode_side import HandoffDesk
from shoal.handoff.session import Identity
from shoal.wire.handoff_messages import Draining, Grant, Granted
from shoal.wire.options import HANDOFF_SERVER_OPTIONS
from shoal.wire.peers import PeerTls, RoleGate
from shoal.wire.ports import bind_first_free, join_address

_STOP_GRACE_S = 1.0
"""The sessions have ended by then; this only lets their last frames out."""


class HandoffServer:
    """Serves the leases of ``desk``. ``listen`` for other processes, ``connect`` within this one.

    Without ``attach`` all payload comes inline.
    """

    def __init__(self, desk: HandoffDesk, identity: Identity, attach: Attach | None = None) -> None:
        self._desk = desk
        self._identity = identity
        self._attach = attach
        self._sessions: set[DecodeSession] = set()
        self._local: set[asyncio.Task[None]] = set()
        self._server: grpc.aio.Server | None = None
        self._serving: asyncio.Task[bool] | None = None

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def is_serving(self) -> bool:
        """From ``listen`` to ``close``, unless a defect ended it."""
        return self._serving is not None and not self._serving.done()

    async def listen(
        self,
        host: str,
        first_port: int,
        last_port: int,
        *,
        advertised_host: str | None = None,
        tls: PeerTls | None = None,
        also: Callable[[grpc.aio.Server], None] | None = None,
    ) -> str:
        """Listen on the first free port of the range; returns the address for prefill, which is also the desk's.

        ``also`` adds other services to the server. With ``tls``, each is open to its callers' certificates alone;
        without, to whoever comes.

        Raises ConfigError if no port is free, or ``host`` isn't this machine's.
        """
        if self._server is not None:
            raise InternalError("this hand-off server listens already")
        gates = () if tls is None else (RoleGate(),)
        server = grpc.aio.server(interceptors=gates, options=HANDOFF_SERVER_OPTIONS)
        add_handoff_service(server, self.serve)
        if also is not None:
            also(server)
        credentials = None if tls is None else tls.server_credentials()
        port = bind_first_free(server, host, first_port, last_port, credentials)
        await server.start()
        self._server = server
        self._serving = asyncio.create_task(server.wait_for_termination())
        self._desk.address = join_address(advertised_host or host, port)
        return self._desk.address

    async def connect(self) -> Channel:
        """Prefill's end of a channel in memory."""
        prefill, decode = memory_pair()
        task = asyncio.get_running_loop().create_task(self._serve_local(decode))
        self._local.add(task)
        task.add_done_callback(self._local.discard)
        return prefill

    async def serve(self, channel: Channel) -> None:
        """Serve one channel until it ends. Raises what was wrong with the other side, if something was."""
        session = DecodeSession(channel, self._desk, self._identity, self._attach)
        self._sessions.add(session)
        try:
            await session.run()
        finally:
            self._sessions.discard(session)

    async def grant(self, grant: Grant, key: bytes, patience_s: float) -> bool | None:
        """Ask the prefill replica that has this key for a prompt, which it will be called for, too. Waits until its
        claim is answered, but no longer than ``patience_s``, and returns whether it is; ``None`` if it couldn't be
        asked: it has no session here, or is leaving.
        """
        for session in self._sessions:
            if session.takes_grants(key):
                session.post(Granted.of(grant))
                return await self._desk.until_answered(grant.lease_id, patience_s)
        return None

    def claimant(self, lease_id: bytes) -> bytes:
        """The key of the prefill replica that has claimed the lease; nothing if none has, or it's long ago."""
        return self._desk.claimant(lease_id)

    async def drain(self, drain_s: float) -> None:
        """Open no more leases, let the open ones finish for ``drain_s``, and close."""
        self._desk.close()
        for session in self._sessions:
            session.post(Draining())
        try:
            async with asyncio.timeout(drain_s):
                await self._desk.idle.wait()
        except TimeoutError:
            pass  # those that are left are cancelled below
        await self.close()

    async def close(self) -> None:
        """End all leases and sessions at once. Twice is a no-op."""
        await self._desk.stop(Unavailable("this decode replica has shut down"))
        await asyncio.gather(*(session.close() for session in self._sessions))
        if self._local:
            await asyncio.wait(self._local)
        if self._server is not None:
            await self._server.stop(_STOP_GRACE_S)

    async def _serve_local(self, channel: Channel) -> None:
        try:
            await self.serve(channel)
        except ShoalError:
            await channel.close()
