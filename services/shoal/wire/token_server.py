"""Decode's end of the token streams: requests come in, and what a step, or some in a row, generated goes out as
one message to each gateway.

::

    open(ticket) ─> outlet: request <── SubmitRequest <── gateway
                            send, send, …, end ──┐
    open(ticket) ─> outlet: send, …            ──┴─> the gateway's queue ─> one FollowResponse ─> gateway

A gateway's stream may come after the first outputs, which wait for it. When it ends, nobody can say what was read:
all its open requests end with PeerGone, and the gateway asks again. Where it has lost its stream and opened another one
before this side has heard of that, those that came since go on with the new one.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio

from shoal.errors import Overloaded, PeerGone, ProtocolViolation, RequestTooLarge, ShoalError
from shoal.process.cutoff import Cutoff
from shoal.v1 import worker_pb2 as pb
from shoal.v1.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from shoal.wire.messages import GenerateRequest, Ticket, TokenOutput
from shoal.wire.options import HANDOFF_MAX_MESSAGE_BYTES
from shoal.wire.outputs import to_outputs
from shoal.wire.requests import from_submit
from shoal.wire.statuses import abort

T = TypeVar("T")
_log = logging.getLogger(__name__)

ID_BYTES = 16
MAX_GATEWAYS = 1024
MAX_BATCH_BYTES = 1 << 20
MAX_OUTPUT_BYTES = HANDOFF_MAX_MESSAGE_BYTES - 64
"""Of one output; the rest is for what a message has around it."""
Sized = tuple[pb.Output, int]
"""An output, and its bytes."""
COME_TIMEOUT_S = 10.0
"""How long a request, or its gateway's stream, is waited for."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a gateway finds a request's outputs: a process, and its address (``host:port``)."""

    server_id: bytes
    address: str


class Outlet:
    """Where one request comes out and its outputs go in."""

    def __init__(self, key: int, gateway: _Gateway) -> None:
        self._key = key
        self.gateway = gateway
        self.cutoff = Cutoff(_gone)
        self._request: GenerateRequest | None = None
        self._peer: str | None = None
        self._num_sent = 0

    def belongs_to(self, peer: str) -> bool:
        """None of its outputs is queued, and its request hasn't come by another connection than that of ``peer``."""
        return self._peer in {None, peer} and self._num_sent == 0

    def move(self, gateway: _Gateway) -> None:
        """From now on, it's read by that stream."""
        del self.gateway.outlets[self._key]
        self.gateway = gateway
        gateway.outlets[self._key] = self

    @property
    def is_deserted(self) -> bool:
        """The gateway's stream has ended, and not because this server does."""
        return self.gateway.is_deserted

    async def request(self, timeout_s: float = COME_TIMEOUT_S) -> GenerateRequest:
        """What the gateway brings once it knows the place.

        Raises PeerGone if the gateway's stream ends before, or it isn't here after ``timeout_s``.
        """
        return await self._until(lambda: self._request, timeout_s, "the gateway didn't bring the request")

    def bring(self, request: GenerateRequest, peer: str) -> None:
        """By the connection of ``peer``. Raises ProtocolViolation if it's here already."""
        if self._request is not None:
            raise ProtocolViolation("this request is here already")
        self._request, self._peer = request, peer
        self.gateway.proceed()

    def send(self, output: TokenOutput) -> None:
        """Never waits. Raises PeerGone once the gateway's stream has ended, and RequestTooLarge for an output that no
        message holds: to write it would end the stream, and all other requests with it."""
        self._put(list(to_outputs(self._key, self._num_sent, output)))

    async def end(self, timeout_s: float = COME_TIMEOUT_S) -> None:
        """The request is complete: wait until all is written, and so the stream's to keep.

        Raises PeerGone if the gateway's stream ends before, or isn't there after ``timeout_s``.
        """
        self._put([pb.Output(key=self._key, index=self._num_sent, is_end=True)])
        number = self.gateway.num_put
        await self._until(
            lambda: self.gateway.num_written >= number or None, timeout_s, "the gateway didn't come to listen"
        )

    def unless_gone(self) -> AbstractAsyncContextManager[None]:
        """What is within ends with PeerGone as soon as the gateway's stream has: nothing else would tell a request that
        waits, and hasn't an output to send, that it waits for nobody."""
        return self.cutoff.within()

    def _put(self, messages: Sequence[pb.Output]) -> None:
        if self.gateway.is_gone:
            raise _gone()
        sized = [(message, message.ByteSize()) for message in messages]  # once: it takes as long as to write them
        if any(size > MAX_OUTPUT_BYTES for _, size in sized):
            raise RequestTooLarge(f"one step told more than {MAX_OUTPUT_BYTES} bytes: ask for fewer log-probabilities")
        self._num_sent += len(messages)
        self.gateway.put(sized)

    async def _until(self, look: Callable[[], T | None], timeout_s: float, otherwise: str) -> T:
        """What ``look`` sees as soon as it sees something. Raises PeerGone if the gateway goes before, or with
        ``otherwise`` after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                while (seen := look()) is None:
                    if self.gateway.is_gone:
                        raise _gone()
                    await self.gateway.progress.wait()
        except TimeoutError as error:
            raise PeerGone(otherwise) from error
        return seen


class _Gateway:
    """A gateway's one stream to this process, from the first request that names it; ``outlets`` are by its keys."""

    def __init__(self) -> None:
        self.outlets: dict[int, Outlet] = {}
        self.num_put = 0
        self.num_written = 0
        self.is_followed = False
        self.is_deserted = False
        self.is_gone = False
        self.wake = asyncio.Event()
        self.progress = asyncio.Event()
        """Replaced whenever it's set."""
        self._waiting: list[Sized] = []

    def put(self, messages: Sequence[Sized]) -> None:
        self.num_put += len(messages)
        self._waiting += messages
        self.wake.set()

    def take(self) -> list[Sized]:
        taken, self._waiting = self._waiting, []
        self.wake.clear()
        return taken

    def written(self, number: int) -> None:
        self.num_written += number
        self.proceed()

    def drop(self) -> None:
        """Twice is a no-op."""
        self.is_gone = True
        self._waiting.clear()
        for outlet in self.outlets.values():
            outlet.cutoff.cut()
        self.wake.set()
        self.proceed()

    def proceed(self) -> None:
        """Who waits for something looks again."""
        self.progress.set()
        self.progress = asyncio.Event()


class TokenServer:
    """Belongs to one event loop. Serves on whatever servers it was added to."""

    def __init__(self) -> None:
        self._server_id = secrets.token_bytes(ID_BYTES)
        self._gateways: dict[bytes, _Gateway] = {}

    @property
    def num_gateways(self) -> int:
        """Those that listen, or have open requests."""
        return len(self._gateways)

    def add_to(self, server: grpc.aio.Server) -> None:
        add_WorkerServiceServicer_to_server(_Servicer(self), server)

    def at(self, address: str) -> Place:
        """This server, which listens at ``address``."""
        return Place(self._server_id, address)

    def close(self) -> None:
        """End all streams; what is still open ends with PeerGone."""
        for gateway_id, gateway in list(self._gateways.items()):
            self._drop(gateway_id, gateway)

    @contextmanager
    def open(self, ticket: Ticket) -> Iterator[Outlet]:
        """A request's outlet, for as long as it runs. Raises ProtocolViolation if it has one."""
        gateway = self._gateways.setdefault(ticket.gateway_id, _Gateway())
        if ticket.key in gateway.outlets:
            raise ProtocolViolation("this request is open already")
        outlet = gateway.outlets[ticket.key] = Outlet(ticket.key, gateway)
        try:
            yield outlet
        finally:
            gateway = outlet.gateway
            del gateway.outlets[ticket.key]
            if not gateway.outlets and not gateway.is_followed:
                self._drop(ticket.gateway_id, gateway)

    def submit(self, request: pb.SubmitRequest, peer: str) -> None:
        """Bring it to its outlet; ``peer`` is whose connection it came by. Raises a ShoalError where none waits for it,
        or it isn't well formed."""
        self._require(request.server_id)
        gateway = self._gateways.get(request.gateway_id)
        outlet = None if gateway is None else gateway.outlets.get(request.key)
        if outlet is None:
            raise PeerGone("no call waits for this request")
        outlet.bring(from_submit(request), peer)

    async def follow(self, request: pb.FollowRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Write that gateway's outputs until its stream ends. Raises a ShoalError where it is for somebody else."""
        gateway_id = request.gateway_id
        if len(gateway_id) != ID_BYTES:
            raise ProtocolViolation(f"a gateway id has {ID_BYTES} bytes, not {len(gateway_id)}")
        self._require(request.server_id)
        if gateway_id not in self._gateways and len(self._gateways) >= MAX_GATEWAYS:
            raise Overloaded(f"{MAX_GATEWAYS} gateways listen here already")
        gateway = self._gateways.setdefault(gateway_id, _Gateway())
        if gateway.is_followed:
            # It has lost the stream before, though this side has not heard of it yet.
            lost, gateway = gateway, _Gateway()
            for outlet in [one for one in lost.outlets.values() if one.belongs_to(context.peer())]:
                outlet.move(gateway)
            self._drop(gateway_id, lost)
            self._gateways[gateway_id] = gateway
        gateway.is_followed = True
        try:
            while not gateway.is_gone:
                await gateway.wake.wait()
                for batch in _batches(gateway.take()):
                    await context.write(pb.FollowResponse(outputs=batch))
                    gateway.written(len(batch))
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            pass  # it's gone
        finally:
            gateway.is_deserted = not gateway.is_gone
            if gateway.is_deserted and gateway.outlets:
                _log.info("a gateway's stream has ended, and %d requests with it", len(gateway.outlets))
            self._drop(gateway_id, gateway)

    def _require(self, server_id: bytes) -> None:
        if server_id != self._server_id:
            raise PeerGone("another process listens here now")

    def _drop(self, gateway_id: bytes, gateway: _Gateway) -> None:
        gateway.drop()
        if self._gateways.get(gateway_id) is gateway:
            del self._gateways[gateway_id]


class _Servicer(WorkerServiceServicer):
    def __init__(self, server: TokenServer) -> None:
        self._server = server

    async def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.SubmitResponse:
        try:
            self._server.submit(request, context.peer())
        except ShoalError as error:
            await abort(context, error)
        return pb.SubmitResponse()

    async def Follow(self, request: pb.FollowRequest, context: Any) -> None:  # type: ignore[override]
        try:
            await self._server.follow(request, context)
        except ShoalError as error:
            await abort(context, error)


def _gone() -> PeerGone:
    return PeerGone("the stream between a gateway and a decode replica has ended")


def _batches(outputs: Sequence[Sized]) -> Iterator[list[pb.Output]]:
    """One, or several where much is told of prompts."""
    batch: list[pb.Output] = []
    num_bytes = 0
    for output, size in outputs:
        if batch and num_bytes + size > MAX_BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(output)
        num_bytes += size
    if batch:
        yield batch
