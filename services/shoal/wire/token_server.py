"""Decode's end of the token streams: requests come in, and what a step, or some in a row, generated goes out as
one message to each gateway.

::

    Submit ─> answer(request, outlet): send, send, … ──┐
    Submit ─> answer(request, outlet): send, …       ──┴─> the gateway's queue ─> one FollowResponse ─> gateway

Submit stays open for as long as its request runs: its status says how that ended, and a gateway that cancels it, or is
gone, ends the request. The gateway's stream may come after the first outputs, which wait for it. When it ends, nobody
can say what was read: all its open requests end with PeerGone, and the gateway asks again. Where it has lost its stream
and opened another one before this side has heard of that, those that came since go on with the new one.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from shoal.errors import Overloaded, PeerGone, ProtocolViolation, RequestTooLarge, ShoalError
from shoal.process.cutoff import Cutoff
from shoal.v1 import worker_pb2 as pb
from shoal.v1.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from shoal.wire.messages import GenerateRequest, TokenOutput
from shoal.wire.options import HANDOFF_MAX_MESSAGE_BYTES
from shoal.wire.outputs import to_outputs
from shoal.wire.requests import from_submit
from shoal.wire.statuses import abort

_log = logging.getLogger(__name__)

ID_BYTES = 16
MAX_GATEWAYS = 1024
MAX_BATCH_BYTES = 1 << 20
MAX_OUTPUT_BYTES = HANDOFF_MAX_MESSAGE_BYTES - 64
"""Of one output; the rest is for what a message has around it."""
Sized = tuple[pb.Output, int]
"""An output, and its bytes."""
COME_TIMEOUT_S = 10.0
"""How long a gateway's stream is waited for."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a gateway brings requests to: a process, and its address (``host:port``)."""

    server_id: bytes
    address: str


class Outlet:
    """Where one request's outputs go in."""

    def __init__(self, key: int, peer: str, gateway: _Gateway) -> None:
        self._key = key
        self._peer = peer
        self.gateway = gateway
        self.cutoff = Cutoff(_gone)
        self._num_sent = 0

    def belongs_to(self, peer: str) -> bool:
        """None of its outputs is queued, and its request came by the connection of ``peer``."""
        return self._peer == peer and self._num_sent == 0

    def move(self, gateway: _Gateway) -> None:
        """From now on, it's read by that stream."""
        del self.gateway.outlets[self._key]
        self.gateway = gateway
        gateway.outlets[self._key] = self

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
        try:
            async with asyncio.timeout(timeout_s):
                while self.gateway.num_written < number:
                    if self.gateway.is_gone:
                        raise _gone()
                    await self.gateway.progress.wait()
        except TimeoutError as error:
            raise PeerGone("the gateway didn't come to listen") from error

    def _put(self, messages: Sequence[pb.Output]) -> None:
        if self.gateway.is_gone:
            raise _gone()
        sized = [(message, message.ByteSize()) for message in messages]  # once: it takes as long as to write them
        if any(size > MAX_OUTPUT_BYTES for _, size in sized):
            raise RequestTooLarge(f"one step told more than {MAX_OUTPUT_BYTES} bytes: ask for fewer log-probabilities")
        self._num_sent += len(messages)
        self.gateway.put(sized)


Answer = Callable[[GenerateRequest, Outlet], Awaitable[None]]
"""Sends a request's outputs; ends when all are sent, or raises the ShoalError that the request ends with."""


class _Gateway:
    """A gateway's one stream to this process, from the first request that names it; ``outlets`` are by its keys."""

    def __init__(self) -> None:
        self.outlets: dict[int, Outlet] = {}
        self.num_put = 0
        self.num_written = 0
        self.is_followed = False
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
        self._proceed()

    def drop(self) -> None:
        """Twice is a no-op."""
        self.is_gone = True
        self._waiting.clear()
        for outlet in self.outlets.values():
            outlet.cutoff.cut()
        self.wake.set()
        self._proceed()

    def _proceed(self) -> None:
        """Who waits for something looks again."""
        self.progress.set()
        self.progress = asyncio.Event()


class TokenServer:
    """Belongs to one event loop. Serves on whatever servers it was added to. Whatever isn't a ShoalError that
    ``answer`` raises is logged, and told as a defect."""

    def __init__(self, answer: Answer) -> None:
        self.server_id = secrets.token_bytes(ID_BYTES)
        self._answer = answer
        self._gateways: dict[bytes, _Gateway] = {}
        self._is_draining = self._is_closed = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def num_gateways(self) -> int:
        """Those that listen, or have open requests."""
        return len(self._gateways)

    def add_to(self, server: grpc.aio.Server) -> None:
        add_WorkerServiceServicer_to_server(_Servicer(self), server)

    def close(self) -> None:
        """End all streams; what is still open ends with PeerGone."""
        for gateway_id, gateway in list(self._gateways.items()):
            self._drop(gateway_id, gateway)

    async def drain(self, timeout_s: float) -> None:
        """Tell gateways to bring no more; return when all that came have ended, or after ``timeout_s``. From then on
        none is taken."""
        self._is_draining = True
        for gateway in self._gateways.values():
            gateway.wake.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            _log.warning("requests are cut off: they took longer than %.0f s to finish", timeout_s)
        self._is_closed = True

    async def submit(self, request: pb.SubmitRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Run it to its end. Raises the ShoalError that it ends with, or is refused with."""
        if self._is_closed:
            raise PeerGone("this decode replica is shutting down", retry_after_s=1.0)
        with self._open(request, context.peer()) as outlet:
            asked = from_submit(request)
            outlet.gateway.put([(accepted := pb.Output(key=request.key, is_accepted=True), accepted.ByteSize())])
            async with outlet.cutoff.within():  # also while there is no output to send, it doesn't wait for nobody
                await self._answer(asked, outlet)
            await outlet.end()

    async def follow(self, request: pb.FollowRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Write that gateway's outputs until its stream ends. Raises a ShoalError where it is for somebody else."""
        gateway_id, gateway = request.gateway_id, self._gateway(request)
        if gateway.is_followed:
            # It has lost the stream before, though this side has not heard of it yet.
            lost, gateway = gateway, _Gateway()
            for outlet in [one for one in lost.outlets.values() if one.belongs_to(context.peer())]:
                outlet.move(gateway)
            self._drop(gateway_id, lost)
            self._gateways[gateway_id] = gateway
        gateway.is_followed = True
        has_told = False
        try:
            while not gateway.is_gone:
                await gateway.wake.wait()
                if self._is_draining and not has_told:
                    has_told = True
                    await context.write(pb.FollowResponse(is_draining=True))
                for batch in _batches(gateway.take()):
                    await context.write(pb.FollowResponse(outputs=batch))
                    gateway.written(len(batch))
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            pass  # it's gone
        finally:
            if not gateway.is_gone and gateway.outlets:
                _log.info("a gateway's stream has ended, and %d requests with it", len(gateway.outlets))
            self._drop(gateway_id, gateway)

    @contextmanager
    def _open(self, request: pb.SubmitRequest, peer: str) -> Iterator[Outlet]:
        """A request's outlet, for as long as it runs. Raises ProtocolViolation if it has one."""
        gateway_id, key, gateway = request.gateway_id, request.key, self._gateway(request)
        if key in gateway.outlets:
            raise ProtocolViolation("this request is open already")
        outlet = gateway.outlets[key] = Outlet(key, peer, gateway)
        self._is_idle.clear()
        try:
            yield outlet
        finally:
            gateway = outlet.gateway
            del gateway.outlets[key]
            if not gateway.outlets and not gateway.is_followed:
                self._drop(gateway_id, gateway)
            if not any(one.outlets for one in self._gateways.values()):
                self._is_idle.set()

    def _gateway(self, request: pb.SubmitRequest | pb.FollowRequest) -> _Gateway:
        """Whose ``request`` is. Raises a ShoalError where it's for another process, or there are too many."""
        gateway_id = request.gateway_id
        if len(gateway_id) != ID_BYTES:
            raise ProtocolViolation(f"a gateway id has {ID_BYTES} bytes, not {len(gateway_id)}")
        if request.server_id != self.server_id:
            raise PeerGone("another process listens here now")
        if gateway_id not in self._gateways and len(self._gateways) >= MAX_GATEWAYS:
            raise Overloaded(f"{MAX_GATEWAYS} gateways listen here already")
        return self._gateways.setdefault(gateway_id, _Gateway())

    def _drop(self, gateway_id: bytes, gateway: _Gateway) -> None:
        gateway.drop()
        if self._gateways.get(gateway_id) is gateway:
            del self._gateways[gateway_id]


class _Servicer(WorkerServiceServicer):
    def __init__(self, server: TokenServer) -> None:
        self._server = server

    async def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.SubmitResponse:
        try:
            await self._server.submit(request, context)
        except ShoalError as error:
            await abort(context, error)
        except Exception as error:  # noqa: BLE001 - the process' edge
            _log.exception("a request failed")
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
