"""The event loop's side of an engine: who asked for a request gets what its steps bring, and gives it back.

``open`` is the one way to put a request into the engine: leaving its block, for whatever reason, frees all it holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from shoal.engine.engine import Engine
from shoal.engine.events import FailureEvent, PromptEvent, Reservation, StepOutput, TokenEvent
from shoal.engine.runner import PrefillChunk
from shoal.engine.thread import EngineThread, has_stopped
from shoal.engine.yielding import NEVER, Yielding
from shoal.errors import InternalError, PeerGone, ShoalError
from shoal.process.heartbeat import Heartbeat

T = TypeVar("T")
# A replica whose steps fail for all so often in a row is replaced: it isn't the requests' fault any more.
MAX_FAILED_STEPS = 3


@dataclass(frozen=True, slots=True)
class ChunkComputed:
    """A chunk of a prompt is computed. Times are monotonic seconds: its request's first step, this step's end."""

    chunk: PrefillChunk
    first_step_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Progress:
    """The request's next token, or what was asked of its prompt, and when that step ended."""

    event: TokenEvent | PromptEvent
    ended_s: float


Event = Reservation | ChunkComputed | Progress


class Inbox:
    """One request's events, in order."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._events: asyncio.Queue[Event | ShoalError] = asyncio.Queue()
        self._error: ShoalError | None = None

    def put(self, event: Event | FailureEvent | ShoalError) -> None:
        self._events.put_nowait(event.error if isinstance(event, FailureEvent) else event)

    async def next(self) -> Event:
        """The next event. Raises the request's own error, or PeerGone if the engine died."""
        if self._error is not None:
            raise self._error
        event = await self._events.get()
        if isinstance(event, ShoalError):
            self._error = event
            raise event
        return event

    async def next_some(self, most: int) -> list[Event]:
        """The next event, and up to ``most`` with those that are here, too. Raises as ``next``, after what came before
        the error."""
        events = [await self.next()]
        while len(events) < most and self._error is None and not self._events.empty():
            event = self._events.get_nowait()
            if isinstance(event, ShoalError):
                self._error = event
            else:
                events.append(event)
        return events

    async def reserved(self) -> Reservation:
        """Wait until the request holds its blocks."""
        event = await self.next()
        if not isinstance(event, Reservation):
            raise InternalError(f"expected a reservation, the engine sent {type(event).__name__}")
        return event


class EngineClient:
    """Commands to one engine thread, and its outputs sorted by request. ``on_step`` sees every output."""

    def __init__(
        self,
        engine: Engine,
        *,
        name: str,
        on_step: Callable[[StepOutput], None] | None = None,
        niceness: int = 0,
        yielding: Yielding = NEVER,
        stream_interval: int = 1,
    ) -> None:
        self._inboxes: dict[str, Inbox] = {}
        self._on_step = on_step
        self._first_step_s: dict[str, float] = {}
        self._num_failed_in_a_row = 0
        self._failed_prompts: set[int | None] = set()
        loop = asyncio.get_running_loop()
        self._thread = EngineThread(
            engine, loop, self._deliver, self._died, name=name, niceness=niceness, yielding=yielding,
            stream_interval=stream_interval,
        )  # fmt: skip

    @property
    def is_serving(self) -> bool:
        """The thread lives, and its last steps did not all fail."""
        return self._thread.is_alive and self._num_failed_in_a_row < MAX_FAILED_STEPS

    @property
    def heartbeat(self) -> Heartbeat:
        """The thread's: a long step beats with every layer."""
        return self._thread.heartbeat

    @contextmanager
    def open(self, request_id: str) -> Iterator[Inbox]:
        """A request's life in the engine: whatever it holds is given back at the end of the block."""
        if request_id in self._inboxes:
            raise InternalError(f"request {request_id} is open already")
        inbox = self._inboxes[request_id] = Inbox(request_id)
        try:
            yield inbox
        finally:
            del self._inboxes[request_id]
            self._first_step_s.pop(request_id, None)
            with suppress(PeerGone):  # an engine that has stopped holds nothing any more
                self._thread.finish(request_id)

    async def call(self, command: Callable[[Engine], T]) -> T:
        """Run a command between two steps; returns or raises what it does."""
        return await self._thread.call(command)

    def post(self, command: Callable[[Engine], None]) -> None:
        """Run a command between two steps without waiting for it."""
        self._thread.post(command)

    def close(self) -> None:
        """Stop the engine after the current step."""
        self._thread.close()

    def _deliver(self, output: StepOutput) -> None:
        for reservation in output.reserved:
            self._put(reservation.request_id, reservation)
        for chunk in output.chunks:
            if chunk.request_id in self._inboxes:
                first_step_s = self._first_step_s.setdefault(chunk.request_id, output.started_s)
                self._put(chunk.request_id, ChunkComputed(chunk, first_step_s, output.ended_s))
        for prompt in output.prompts:
            self._put(prompt.request_id, Progress(prompt, output.ended_s))
        for token in output.tokens:
            self._put(token.request_id, Progress(token, output.ended_s))
        for failure in output.failures:
            self._put(failure.request_id, failure)
        if output.all_failed:
            # A prompt that makes NaN is counted once, however often it's retried: it may be its own fault.
            prompts = {failure.prompt for failure in output.failures}
            self._num_failed_in_a_row += not prompts <= self._failed_prompts
            self._failed_prompts |= prompts - {None}
        # A prompt's kept layers alone prove nothing: what is projected of it follows in a step that may fail.
        elif any(one.is_whole and one.start < one.end for one in output.chunks) if output.chunks else output.num_rows:
            self._num_failed_in_a_row = 0
            self._failed_prompts.clear()
        if self._on_step is not None:
            self._on_step(output)

    def _put(self, request_id: str, event: Event | FailureEvent) -> None:
        # A request that was given up between two steps has no inbox any more.
        inbox = self._inboxes.get(request_id)
        if inbox is not None:
            inbox.put(event)

    def _died(self) -> None:
        for inbox in self._inboxes.values():
            inbox.put(has_stopped())
