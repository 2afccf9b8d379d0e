"""The engine's own thread: commands in by a mailbox, a step's ``StepOutput`` out to the event loop, or some at a time.

The thread sleeps until something comes when nothing can run; there is no polling, and no lock on the engine.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from shoal.engine.engine import Engine
from shoal.engine.events import StepOutput
from shoal.engine.outbox import Outbox
from shoal.engine.yielding import NEVER, Yielding
from shoal.errors import PeerGone
from shoal.process.heartbeat import Heartbeat
from shoal.process.machine import step_back
from shoal.process.mailbox import Mailbox

_PIECE_EVERY_S = 0.05
"""How long, between two pieces of what it prepares, an engine leaves the cores to others, which may be at an answer."""
_log = logging.getLogger(__name__)
T = TypeVar("T")
Command = Callable[[Engine], None]


class EngineThread:
    """Runs ``engine`` until ``close``. ``deliver`` is called on ``loop`` with every output that says something: a
    step ran, or the counts changed.

    ``died`` is called there once the thread ends, for whatever reason. The thread steps back for others by
    ``niceness``; ``yielding`` says when a step waits for them. Tokens in the midst of answers are told
    ``stream_interval`` steps at a time.
    """

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[StepOutput], None],
        died: Callable[[], None],
        *,
        name: str,
        niceness: int = 0,
        yielding: Yielding = NEVER,
        stream_interval: int = 1,
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._deliver = deliver
        self._died = died
        self._commands: Mailbox[Command | None] = Mailbox()
        self._pending: set[asyncio.Future[Any]] = set()
        self._closed = False
        self._niceness = niceness
        self._yielding = yielding
        self._began_s = 0.0
        self._outbox = Outbox(stream_interval)
        self.heartbeat = Heartbeat("engine")
        engine.told_of_progress(self._progressed)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        # A thread that has told its end may take a moment longer to be gone.
        return not self._closed and self._thread.is_alive()

    async def call(self, command: Callable[[Engine], T]) -> T:
        """Run ``command`` between two steps and return (or raise) what it does."""
        future: asyncio.Future[T] = self._loop.create_future()

        def run(engine: Engine) -> None:
            try:
                result = command(engine)
            except Exception as error:  # noqa: BLE001 - handed to the caller, who awaits it
                self._on_loop(_set_exception, future, error)
            else:
                self._on_loop(_set_result, future, result)

        self._put(run)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return await future

    def post(self, command: Command) -> None:
        """Run ``command`` between two steps; nobody waits for it, so a failure is logged."""

        def run(engine: Engine) -> None:
            try:
                command(engine)
            except Exception:  # noqa: BLE001 - the thread's edge: it must outlive a faulty command
                _log.exception("an engine command failed")

        self._put(run)

    def finish(self, request_id: str) -> None:
        """Give back all that a request holds; a step of its prompt alone ends at its next layer."""
        self._engine.desertion.leave(request_id)
        self.post(lambda engine: engine.finish(request_id))

    def close(self) -> None:
        """Stop after the current step. Twice is a no-op."""
        if not self._closed:
            self._closed = True
            self._commands.put(None)
        self._thread.join()

    def _put(self, command: Command) -> None:
        if self._closed or not self._thread.is_alive():
            raise has_stopped()
        self._commands.put(command)

    def _run(self) -> None:
        may_run, counts = True, None  # the first look tells what an idle engine has
        try:
            step_back(self._niceness)
            torch.get_num_threads()  # from now on it's this thread's own, whatever others set theirs to
            while self._obey(wait=not may_run):
                self.heartbeat.beat()
                if self._outbox.holds_back and not self._engine.scheduler.only_goes_on(-math.inf):
                    self._tell_all()  # a step with prompts in it takes longer than anybody should wait
                began_s = time.monotonic()
                output = self._engine.step()
                if output.num_rows:  # else nothing was computed to its end, and nobody need wait for that
                    self._began_s = began_s
                self._tell_due()
                may_run = not output.is_idle
                if may_run or output.wants_blocks or output.finished_kv_bytes or output.counts != counts:
                    counts = output.counts
                    self._outbox.put(output)
                if not output.tokens:
                    self._tell_all()
        except Exception:  # noqa: BLE001 - the thread's edge: whoever waits is told below
            _log.exception("the engine thread failed")
        finally:
            self.heartbeat.stop()
            self._tell_all()
            self._on_loop(self._ended)
            self._yielding.are_on_their_way(False)  # nobody is to wait for what comes here

    def _progressed(self) -> None:
        self.heartbeat.beat()
        self._tell_due()

    def _tell_due(self) -> None:
        """Deliver what the last steps brought, once the next one computes, or there's none: before that, the loop would
        take Python from this thread while the cores wait for it."""
        if due := self._outbox.take():
            self._on_loop(self._deliver_all, due)

    def _tell_all(self) -> None:
        """Deliver it, whether it could wait or not."""
        if held := self._outbox.take_all():
            self._on_loop(self._deliver_all, held)

    def _deliver_all(self, outputs: Sequence[StepOutput]) -> None:
        for output in outputs:
            try:
                self._deliver(output)
            except Exception:  # noqa: BLE001 - the others have come, too, and somebody waits for them
                _log.exception("an engine's output could not be delivered")

    def _ended(self) -> None:
        """Whoever still waits for a command would wait for ever."""
        self._closed = True
        for future in tuple(self._pending):
            _set_exception(future, has_stopped())
        self._died()

    def _obey(self, *, wait: bool) -> bool:
        """Run all commands that are here, waiting for one first if told to, and for more while it yields. Who waits
        prepares for the next ones. False once closed."""
        while True:
            wait_s = self._yielding.wait_s(self._engine.scheduler, self._began_s, time.monotonic())
            if wait_s:
                self._tell_all()
            prepares = wait and not self._engine.is_prepared
            if (wait and not prepares) or wait_s:
                self.heartbeat.rest()
            try:
                command = self._commands.take(_PIECE_EVERY_S if prepares else None if wait else wait_s)
            except queue.Empty:
                if prepares:
                    self._engine.prepare()
                    self.heartbeat.beat()
                elif not wait_s:
                    return True
                continue
            self.heartbeat.beat()
            self._tell_all()  # first, what came first
            if command is None:
                return False
            command(self._engine)
            wait = False

    def _on_loop(self, function: Callable[..., None], *args: object) -> None:
        # At shutdown the loop may close first: nobody is left to be told.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


def has_stopped() -> PeerGone:
    """As of a replica that isn't there any more: nothing comes of it, and another one is to go on."""
    return PeerGone("this replica's engine has stopped", retry_after_s=1.0)


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
