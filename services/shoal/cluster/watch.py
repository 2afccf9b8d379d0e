"""Whether all threads and servers of a replica work: asked by a thread that needs none of them, and told by another.

::

    every LOOK_S, on a thread of its own:
        a thread that has neither come further nor computed for limit_s, or not come further for ten times as long,
        or has ended; or a server that has ─> unhealthy
            ├─> metrics say which one it is, and the log where every thread stands
            ├─> it's listed as unhealthy: it gets no more work, and the gateway isn't ready if it was the last
            └─> check_health raises, and Ray Serve replaces the replica; unless all is well again before
        Ray Serve stops the replica ─> the directory forgets it; it finishes what it has

The event loop is watched as a thread is: it has work from when it's asked to say something until it has said it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from shoal.errors import PeerGone
from shoal.process.heartbeat import Heartbeat
from shoal.telemetry import Component, HealthMetrics

LOOK_S = 0.25
_COMPUTING = 10
"""So many times as long may native code compute without a sign: on a machine that has too much to do, it takes long."""
_BUSY = 0.01
"""The share of a look's time that a thread that computes gets of the processor, however many want it, and be it as nice
as can be; one that only wakes now and then takes less."""
_CLOSE_S = 1.0
_log = logging.getLogger(__name__)


class Server(Protocol):
    @property
    def is_serving(self) -> bool: ...


class Watch:
    """``heartbeats`` are of threads. ``publish`` tells others whether this replica is to get work: not if it isn't
    healthy, nor if it ``is_stopping``. It may block, which holds up no look, and is called again until it has
    succeeded.

    What counts is how often this one has looked: while the whole process was stopped, nobody could come further.
    """

    def __init__(
        self,
        heartbeats: Iterable[Heartbeat],
        servers: Mapping[Component, Server],
        *,
        limit_s: float,
        metrics: HealthMetrics,
        publish: Callable[[bool], None],
        is_stopping: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit_s = limit_s
        self._max_looks = max(1, math.ceil(limit_s / LOOK_S))
        self._loop = _LoopPulse(asyncio.get_running_loop(), clock)
        self._pulses = {Component(one.name): _Pulse(one) for one in (*heartbeats, self._loop.heartbeat)}
        self._servers = dict(servers)
        self._metrics = metrics
        self._publish = publish
        self._is_stopping = is_stopping
        self._clock = clock
        self._looked_s = clock()
        self._is_published = True
        self._unhealthy: tuple[Component, ...] = ()
        self._is_closed = threading.Event()
        self._has_looked = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="shoal-watch", daemon=True)
        self._teller = threading.Thread(target=self._keep_telling, name="shoal-watch-tell", daemon=True)

    @property
    def unhealthy(self) -> tuple[Component, ...]:
        """What doesn't work, as of the last look."""
        return self._unhealthy

    def require_healthy(self) -> None:
        """Raises PeerGone, as of a replica that isn't there any more: it soon won't be."""
        if self._unhealthy:
            raise _gone(", ".join(self._unhealthy))
        if self._clock() - self._looked_s > self._limit_s and not self._is_closed.is_set():
            raise _gone("the thread that watches the others")

    def start(self) -> None:
        """Once this replica is published."""
        self._looked_s = self._clock()
        self._thread.start()
        self._teller.start()

    async def close(self) -> None:
        """Publish nothing any more. Before a replica drains: what ends then, ends as it should."""
        self._is_closed.set()
        self._has_looked.set()
        for thread in (self._thread, self._teller):
            if thread.ident is not None:
                await asyncio.to_thread(thread.join, _CLOSE_S)

    def look(self) -> None:
        """Look once, and tell, as both threads do."""
        self._look()
        self._tell()

    def _look(self) -> None:
        self._looked_s = self._clock()
        self._loop.ask()
        ill = {name: pulse.has_stopped(self._max_looks) for name, pulse in self._pulses.items()}
        for name, server in self._servers.items():
            ill[name] = ill.get(name, False) or not server.is_serving
        for name, is_ill in ill.items():
            self._metrics.component(name, is_healthy=not is_ill)
        self._metrics.loop_lag(self._loop.lag_s)
        before, self._unhealthy = self._unhealthy, tuple(name for name, is_ill in ill.items() if is_ill)
        if self._unhealthy != before:
            self._say()

    def _keep_looking(self) -> None:
        while not self._is_closed.wait(LOOK_S):
            self._look()
            self._has_looked.set()

    def _keep_telling(self) -> None:
        while not self._is_closed.is_set():
            self._has_looked.wait()
            self._has_looked.clear()
            self._tell()

    def _say(self) -> None:
        if not self._unhealthy:
            _log.warning("all threads and servers work again")
            return
        _log.error("%s stopped working", ", ".join(self._unhealthy))
        faulthandler.dump_traceback(file=2)  # where, and nothing of what with

    def _tell(self) -> None:
        try:
            is_listed = not self._unhealthy and not self._is_stopping()
            if is_listed != self._is_published and not self._is_closed.is_set():
                self._publish(is_listed)
                self._is_published = is_listed
        except Exception:  # noqa: BLE001 - the thread's edge: Ray's head may be away, and it's tried again
            _log.exception("the directory couldn't be told")


class _Pulse:
    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._num_beats: int | None = None
        self._cpu_s = 0.0
        self._num_still = 0
        self._num_idle = 0

    def has_stopped(self, max_looks: int) -> bool:
        """Whether this look is one too many in a row that found it where it was."""
        num_beats, cpu_s = self._heartbeat.num_beats, self._heartbeat.cpu_s
        is_still = num_beats is not None and num_beats == self._num_beats
        self._num_still = self._num_still + 1 if is_still else 0
        self._num_idle = self._num_idle + 1 if is_still and cpu_s - self._cpu_s < _BUSY * LOOK_S else 0
        self._num_beats, self._cpu_s = num_beats, cpu_s
        is_late = self._num_idle >= max_looks or self._num_still >= _COMPUTING * max_looks
        return is_late or self._heartbeat.is_stopped


class _LoopPulse:
    """The event loop's, on whose thread it's made."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        self.heartbeat = Heartbeat.of_this_thread(Component.EVENT_LOOP)
        self._loop = loop
        self._clock = clock
        self._asked_s: float | None = None
        self._lag_s = 0.0

    @property
    def lag_s(self) -> float:
        """How long it took to answer, or hasn't answered for."""
        asked_s = self._asked_s
        return self._lag_s if asked_s is None else self._clock() - asked_s

    def ask(self) -> None:
        if self._asked_s is None and not self._loop.is_closed():
            self._asked_s = self._clock()
            self.heartbeat.beat()
            self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        if self._asked_s is not None:
            self._lag_s = self._clock() - self._asked_s
        self._asked_s = None
        self.heartbeat.rest()


def _gone(what: str) -> PeerGone:
    return PeerGone(f"this replica is being replaced: {what} stopped working", retry_after_s=1.0)
