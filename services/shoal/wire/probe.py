"""Whether decode's server answers: asked over the wire, by the address and the certificates that others come with.

That a server's task lives says nothing of gRPC's own threads, nor of the port. So it's asked for a method that it
hasn't got, and whatever it says, it's there. One connection, as its peers have: it's opened anew when no answers come.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

import grpc
import grpc.aio

from shoal.errors import UntrustedPeer
from shoal.wire.options import HANDOFF_CHANNEL_OPTIONS
from shoal.wire.peers import PeerTls, open_channel, refusal

_log = logging.getLogger(__name__)

PAUSE_S = 1.0
PATIENCE_S = 1.2
RETRY_S = 0.2
MAX_UNANSWERED = 2
"""In a row: an event loop that was late for a moment finds out about one question by itself."""
_METHOD = "/shoal.v1.Probe/Ask"


class Server(Protocol):
    @property
    def is_serving(self) -> bool: ...


class ProbedServer:
    """``server``, which listens at ``address``, for whoever watches it. Belongs to the event loop that it's made on."""

    def __init__(self, server: Server, address: str, tls: PeerTls | None) -> None:
        self._server = server
        self._address = address
        self._tls = tls
        self._num_unanswered = 0
        self._asking = asyncio.create_task(self._ask_for_ever())
        self._asking.add_done_callback(_ended)

    @property
    def is_serving(self) -> bool:
        answers = self._num_unanswered < MAX_UNANSWERED and not self._asking.done()
        return answers and self._server.is_serving

    async def close(self) -> None:
        """Ask no more. Twice is a no-op."""
        self._asking.cancel()
        await asyncio.gather(self._asking, return_exceptions=True)

    async def _ask_for_ever(self) -> None:
        while True:
            async with open_channel(self._address, HANDOFF_CHANNEL_OPTIONS, self._tls) as channel:
                try:
                    await self._ask_until_unanswered(channel)
                except UntrustedPeer:
                    # It's there. That its certificate has expired, or is another authority's, is no fault of the
                    # server's, and connections that are there go on; the next one has the certificates of then.
                    self._num_unanswered = 0
                    await asyncio.sleep(PAUSE_S)

    async def _ask_until_unanswered(self, channel: grpc.aio.Channel) -> None:
        """Twice in a row, before another connection, which takes longer still."""
        num_tried = 0
        while num_tried < MAX_UNANSWERED:
            if await self._is_answered(channel):
                num_tried = self._num_unanswered = 0
                await asyncio.sleep(PAUSE_S)
            else:
                num_tried += 1
                self._num_unanswered += 1
                await asyncio.sleep(RETRY_S)

    async def _is_answered(self, channel: grpc.aio.Channel) -> bool:
        """Raises UntrustedPeer if it's the server's certificate that was the answer."""
        try:
            ask = channel.unary_unary(_METHOD, request_serializer=bytes, response_deserializer=bytes)
            async with asyncio.timeout(PATIENCE_S):  # gRPC's own is by the wall clock, which may jump
                await ask(b"")
        except TimeoutError:
            return False
        except grpc.aio.AioRpcError as error:
            if (refused := refusal(error, self._address)) is not None:
                raise refused from None
            return error.code() is not grpc.StatusCode.UNAVAILABLE
        return True


def _ended(asking: asyncio.Task[None]) -> None:
    if not asking.cancelled():
        _log.error("the probe of decode's server ended", exc_info=asking.exception())
