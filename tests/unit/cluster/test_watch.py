"""Each thread and server of a replica, wedged and killed for real: the watch tells within five seconds, and which."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engines import make_engine
from kv_prompts import SHAPE, ArraySink
from models import tiny_llama
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from shoal.api.http_server import HttpServer
from shoal.api.tokenizer import Tokenizer
from shoal.cluster.watch import LOOK_S, Server, Watch
from shoal.config import ShoalConfig
from shoal.decode import sink as sinks
from shoal.decode.sink import PoolSink
from shoal.engine.client import EngineClient
from shoal.errors import PeerGone
from shoal.handoff.base import new_incarnation
from shoal.handoff.carriers.nixl.thread import NixlThread
from shoal.handoff.decode_side import HandoffDesk
from shoal.handoff.lease_table import LeaseTimes
from shoal.handoff.server import HandoffServer
from shoal.handoff.session import Identity
from shoal.model.files import locate
from shoal.model.kv_layout import stage_layout
from shoal.model.kv_pool import KvPool
from shoal.process.heartbeat import Heartbeat
from shoal.telemetry import Component, HealthMetrics, serve_metrics
from shoal.wire.handoff_messages import Chunk
from shoal.wire.messages import Depth, SamplingParams

LIMIT_S = ShoalConfig().ray.stall_timeout_s
NUM_LOOKS = round(LIMIT_S / LOOK_S)
"""So many after the first one that found the thread at work. The gateway asks the directory once a second."""
WITHIN_S = 5.0
PATIENCE_S = 20.0


class Watched:
    """A watch whose looks the test takes itself, as the watching thread would every ``LOOK_S``."""

    def __init__(self, *heartbeats: Heartbeat, servers: Mapping[Component, Server] | None = None) -> None:
        self.now_s = 1000.0
        self.published: list[bool] = []
        self.is_stopping = False
        self.registry = CollectorRegistry()
        self.watch = Watch(
            heartbeats,
            servers or {},
            limit_s=LIMIT_S,
            metrics=HealthMetrics(self.registry),
            publish=self.published.append,
            is_stopping=lambda: self.is_stopping,
            clock=lambda: self.now_s,
        )

    async def look(self, times: int = 1) -> tuple[Component, ...]:
        for _ in range(times):
            self.now_s += LOOK_S
            self.watch.look()
            answered = asyncio.Event()  # the loop answers this one after the watch's own question
            asyncio.get_running_loop().call_soon_threadsafe(answered.set)
            await answered.wait()
        return self.watch.unhealthy

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


@pytest.fixture(autouse=True)
def no_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks of a test there's no time in which the processor would work for a thread or not."""
    monkeypatch.setattr(Heartbeat, "cpu_s", 0.0)


class Wedge:
    """Work that doesn't end before it's let go."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self._may_end = threading.Event()

    def __call__(self, *_args: Any, **_options: Any) -> None:
        self.has_begun.set()
        assert self._may_end.wait(PATIENCE_S)

    async def begun(self) -> None:
        assert await asyncio.to_thread(self.has_begun.wait, PATIENCE_S)

    def let_go(self) -> None:
        self._may_end.set()


# --- threads that hang ----------------------------------------------------------------------------------


@dataclass
class Thread:
    """One that has taken up ``wedge``; ``ends`` waits until it's done with it."""

    heartbeat: Heartbeat
    ends: Callable[[], Any]


@asynccontextmanager
async def engine_in_a_step(wedge: Wedge) -> AsyncIterator[Thread]:
    """In the midst of a forward, and not in Python's hands."""
    core = make_engine(tiny_llama(torch.float32, layers=2)[1], 0)
    client = EngineClient(core, name="test")
    run = core.runner.run
    core.runner.run = lambda plan: (wedge(), run(plan))[1]  # type: ignore[method-assign, func-returns-value]
    with client.open("one") as inbox:
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        await client.call(lambda engine: engine.submit_generate("one", (3, 4), Depth.FULL, sampling))
        yield Thread(client.heartbeat, lambda: asyncio.wait_for(inbox.next(), PATIENCE_S))
    client.close()


@asynccontextmanager
async def engine_in_a_command(wedge: Wedge) -> AsyncIterator[Thread]:
    client = EngineClient(make_engine(tiny_llama(torch.float32, layers=2)[1], 0), name="test")
    call = asyncio.create_task(client.call(wedge))
    yield Thread(client.heartbeat, lambda: asyncio.wait_for(call, PATIENCE_S))
    client.close()


def small_sink() -> PoolSink:
    layout = stage_layout(
        num_layers=2, num_kept=1, num_held=2, num_kv_heads=1, head_dim=2, dtype_bytes=4, block_tokens=4
    )
    return PoolSink(KvPool(layout, 2, dtype=torch.float32, device=torch.device("cpu")))


@asynccontextmanager
async def copy_thread(wedge: Wedge) -> AsyncIterator[Thread]:
    sink = small_sink()
    sink._copy = wedge  # type: ignore[method-assign]
    copy = asyncio.create_task(sink.write((0,), Chunk(b"1" * 16, 0, 0, 1, 0, 1, 0, b""), lambda: True))
    yield Thread(sink.heartbeat, lambda: asyncio.wait_for(copy, PATIENCE_S))
    sink.close()


@asynccontextmanager
async def nixl_thread(wedge: Wedge) -> AsyncIterator[Thread]:
    thread = NixlThread()
    call = thread.submit(wedge)
    yield Thread(thread.heartbeat, lambda: asyncio.wait_for(asyncio.wrap_future(call), PATIENCE_S))
    await asyncio.to_thread(thread.close)


@asynccontextmanager
async def tokenizer_thread(wedge: Wedge) -> AsyncIterator[Thread]:
    tokenizer = Tokenizer(locate("smollm2").tokenizer(), max_inline_chars=1)
    encode = tokenizer._encode
    tokenizer._encode = lambda *args, **options: (wedge(), encode(*args, **options))[1]  # type: ignore[method-assign, func-returns-value]
    call = asyncio.create_task(tokenizer.encode("a long text"))
    yield Thread(tokenizer.heartbeat, lambda: asyncio.wait_for(call, PATIENCE_S))
    tokenizer.close()


@pytest.mark.parametrize(
    "thread",
    [engine_in_a_step, engine_in_a_command, copy_thread, nixl_thread, tokenizer_thread],
    ids=lambda it: it.__name__,
)
async def test_a_thread_that_hangs_is_told_within_five_seconds_and_all_is_well_when_it_goes_on(thread: Any) -> None:
    wedge = Wedge()
    async with thread(wedge) as found:
        await wedge.begun()
        it = Watched(found.heartbeat)
        began_s = it.now_s
        assert await it.look(NUM_LOOKS) == () and it.published == []
        it.watch.require_healthy()
        assert await it.look() == (Component(found.heartbeat.name),)
        assert it.now_s - began_s + 1.0 < WITHIN_S, "the gateway may hear of it a second later"
        assert it.published == [False] and it.metric("shoal_component_healthy", component=found.heartbeat.name) == 0
        with pytest.raises(PeerGone, match=f"being replaced: {found.heartbeat.name}"):
            it.watch.require_healthy()
        wedge.let_go()
        await found.ends()
        async with asyncio.timeout(PATIENCE_S):
            while await it.look():
                pass  # it's about to go on
        assert it.published == [False, True]
        assert it.metric("shoal_component_healthy", component=found.heartbeat.name) == 1


async def at_rest(*heartbeats: Heartbeat) -> None:
    """Whoever waits for a call is woken by it, a moment before the thread has gone back to sleep."""
    async with asyncio.timeout(PATIENCE_S):
        while any(heartbeat.num_beats is not None for heartbeat in heartbeats):
            await asyncio.sleep(0)


async def test_a_thread_without_work_is_well_however_long() -> None:
    client = EngineClient(make_engine(tiny_llama(torch.float32, layers=2)[1], 0), name="test")
    await client.call(lambda engine: engine.counts())
    sink, nixl = small_sink(), NixlThread()
    await asyncio.wrap_future(nixl.submit(lambda: None))
    await at_rest(client.heartbeat, nixl.heartbeat)
    it = Watched(client.heartbeat, sink.heartbeat, nixl.heartbeat)
    assert await it.look(3 * NUM_LOOKS) == () and it.published == []
    client.close()
    sink.close()
    nixl.close()


async def test_a_step_that_takes_long_is_no_hang_as_long_as_its_layers_go_on() -> None:
    core = make_engine(tiny_llama(torch.float32, layers=6)[1], 2)
    client = EngineClient(core, name="test")
    it = Watched(client.heartbeat)
    loop, layer = asyncio.get_running_loop(), core.runner.decoder._layer

    def slow_layer(*args: Any) -> torch.Tensor:
        """As long as one may take: just short of what would be too long."""
        for _ in range(NUM_LOOKS - 1):
            asyncio.run_coroutine_threadsafe(it.look(), loop).result(PATIENCE_S)
        return layer(*args)

    core.runner.decoder._layer = slow_layer  # type: ignore[method-assign]
    with client.open("one") as inbox:
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        await client.call(lambda engine: engine.submit_generate("one", (3, 4, 5), Depth.SHALLOW, sampling))
        await asyncio.wait_for(inbox.next(), PATIENCE_S)
    assert it.now_s > 1000 + 5 * LIMIT_S and it.published == []
    client.close()


class Computing(Heartbeat):
    """Of a thread for which the processor works so long between two looks."""

    between_s = 0.01

    @property
    def cpu_s(self) -> float:
        self.time_s = getattr(self, "time_s", 0.0) + self.between_s
        return self.time_s


async def test_a_thread_that_wakes_now_and_then_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Computing, "between_s", 0.001)
    heartbeat = Computing("engine")
    it = Watched(heartbeat)
    heartbeat.beat()
    assert await it.look(NUM_LOOKS) == ()
    assert await it.look() == (Component.ENGINE,)


@pytest.mark.parametrize("share", [0.04, 15 / 1039], ids=["beside one", "as nice as can be, beside one that isn't"])
async def test_a_thread_that_computes_has_longer_but_not_for_ever(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Computing, "between_s", share * LOOK_S)
    heartbeat = Computing("engine")
    it = Watched(heartbeat)
    heartbeat.beat()
    assert await it.look(10 * NUM_LOOKS) == ()
    assert await it.look() == (Component.ENGINE,)


async def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    heartbeat = Heartbeat("engine")
    it = Watched(heartbeat)
    heartbeat.beat()
    await it.look()
    it.now_s += 3600
    assert await it.look() == ()


# --- threads that die -----------------------------------------------------------------------------------

dies = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@dies
async def test_an_engine_thread_that_dies_is_told_at_once() -> None:
    client = EngineClient(make_engine(tiny_llama(torch.float32, layers=2)[1], 0), name="test")

    def die(_engine: Any) -> None:
        raise SystemExit

    client.post(die)
    await asyncio.to_thread(client._thread._thread.join, PATIENCE_S)
    it = Watched(client.heartbeat)
    assert await it.look() == (Component.ENGINE,)
    client.close()


async def test_a_copy_thread_that_cannot_start_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise MemoryError

    monkeypatch.setattr(sinks, "_compute_alone", fails)
    sink = small_sink()
    chunk = Chunk(b"1" * 16, 0, 0, 1, 0, 1, b"", 0)
    for _ in range(2):  # the first may be taken up before it's known
        with pytest.raises(RuntimeError):
            await sink.write((0,), chunk, lambda: True)
    it = Watched(sink.heartbeat)
    assert await it.look() == (Component.COPY,)
    sink.close()


@dies
async def test_a_nixl_thread_that_dies_is_told_at_once() -> None:
    class Defect:
        def poll(self, now_s: float) -> float | None:
            raise SystemExit

    thread = NixlThread()
    thread.submit(lambda: thread.add(Defect()))
    await asyncio.to_thread(thread._thread.join, PATIENCE_S)
    assert await Watched(thread.heartbeat).look() == (Component.NIXL,)
    thread.close()


async def test_a_tokenizer_without_a_thread_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(locate("smollm2").tokenizer(), max_inline_chars=1)

    def cannot(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", cannot)
        with pytest.raises(RuntimeError, match="can't start"):
            await tokenizer.encode("a long text")
    assert await Watched(tokenizer.heartbeat).look() == (Component.TOKENIZER,)
    tokenizer.close()


# --- the event loop -------------------------------------------------------------------------------------


@contextmanager
def loop_elsewhere() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()


def test_an_event_loop_that_hangs_is_told_and_its_lag_is_measured_meanwhile() -> None:
    with loop_elsewhere() as loop:

        async def make() -> Watched:
            return Watched()

        async def nothing() -> None:
            pass

        it, wedge = asyncio.run_coroutine_threadsafe(make(), loop).result(PATIENCE_S), Wedge()
        it.watch.look()
        asyncio.run_coroutine_threadsafe(nothing(), loop).result(PATIENCE_S)
        loop.call_soon_threadsafe(wedge)
        assert wedge.has_begun.wait(PATIENCE_S)
        for number in range(NUM_LOOKS + 1):
            assert it.published == []
            it.watch.look()
            assert it.metric("shoal_event_loop_lag_seconds") == pytest.approx(number * LOOK_S)
            it.now_s += LOOK_S
        assert it.watch.unhealthy == (Component.EVENT_LOOP,) and it.published == [False]
        wedge.let_go()
        asyncio.run_coroutine_threadsafe(nothing(), loop).result(PATIENCE_S)
        it.watch.look()
        assert it.published == [False, True]


async def test_a_loop_that_is_late_says_by_how_much() -> None:
    it = Watched()
    it.watch.look()
    it.now_s += 0.5
    await asyncio.sleep(0)
    await it.look()
    assert it.metric("shoal_event_loop_lag_seconds") == 0  # asked just now
    it.watch.look()
    it.now_s += 0.75
    it.watch.look()
    assert it.metric("shoal_event_loop_lag_seconds") == pytest.approx(0.75)


# --- servers --------------------------------------------------------------------------------------------


async def test_a_hand_off_server_that_ends_is_told_at_once() -> None:
    times = LeaseTimes(claim_timeout_s=30.0, ttl_s=5.0)
    desk = HandoffDesk(ArraySink(), SHAPE, times=times, credit_bytes=4096)
    server = HandoffServer(desk, Identity(new_incarnation(), (SHAPE.plan_hash,)))
    it = Watched(servers={Component.HANDOFF_SERVER: server})
    assert await it.look() == (Component.HANDOFF_SERVER,)
    await server.listen("127.0.0.1", 23100, 23999)
    assert await it.look() == ()
    assert server._server is not None and server._serving is not None
    await server._server.stop(0)
    await asyncio.wait([server._serving], timeout=PATIENCE_S)
    assert await it.look() == (Component.HANDOFF_SERVER,) and it.published[-1] is False
    await server.close()


async def test_an_http_server_that_ends_is_told_at_once() -> None:
    server = HttpServer(Starlette())
    await server.start("127.0.0.1", 0)
    it = Watched(servers={Component.HTTP_SERVER: server})
    assert await it.look() == ()
    await server.stop()
    assert await it.look() == (Component.HTTP_SERVER,)


async def test_a_metrics_server_that_ends_is_told_at_once() -> None:
    server = serve_metrics(CollectorRegistry(), "127.0.0.1", 22800, 22899)
    it = Watched(servers={Component.METRICS_SERVER: server})
    assert await it.look() == ()
    await asyncio.to_thread(server.close)
    assert await it.look() == (Component.METRICS_SERVER,)


async def test_an_engine_whose_steps_all_fail_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    client = EngineClient(make_engine(tiny_llama(torch.float32, layers=2)[1], 0), name="test")
    it = Watched(client.heartbeat, servers={Component.ENGINE: client})
    assert await it.look() == ()
    client._num_failed_in_a_row = 3
    assert await it.look() == (Component.ENGINE,)
    client.close()


# --- the watch itself -----------------------------------------------------------------------------------


async def test_its_own_thread_looks_and_publishes_without_the_event_loop() -> None:
    heartbeat, told = Heartbeat("engine"), threading.Event()
    watch = Watch(
        (heartbeat,),
        {},
        limit_s=2 * LOOK_S,
        metrics=HealthMetrics(CollectorRegistry()),
        publish=lambda is_healthy: told.set() if not is_healthy else None,
    )
    heartbeat.beat()
    watch.start()
    assert told.wait(PATIENCE_S)  # the loop waits here, and so hangs, too
    with pytest.raises(PeerGone, match="engine"):
        watch.require_healthy()
    await watch.close()
    assert not watch._thread.is_alive()


async def test_a_watch_that_looks_no_more_is_unhealthy_itself() -> None:
    it = Watched()
    await it.look()
    it.watch.require_healthy()
    it.now_s += LIMIT_S + 0.1
    with pytest.raises(PeerGone, match="watches the others"):
        it.watch.require_healthy()


async def test_what_could_not_be_published_is_published_again(caplog: pytest.LogCaptureFixture) -> None:
    heartbeat, answers = Heartbeat("engine"), iter([ConnectionError("Ray's head is away"), None])
    told: list[bool] = []

    def publish(is_healthy: bool) -> None:
        if (error := next(answers)) is not None:
            raise error
        told.append(is_healthy)

    watch = Watch((heartbeat,), {}, limit_s=1, metrics=HealthMetrics(CollectorRegistry()), publish=publish)
    heartbeat.stop()
    watch.look()
    assert told == [] and "couldn't be told" in caplog.text
    watch.look()
    watch.look()
    assert told == [False]


async def test_a_replica_that_is_to_stop_gets_no_more_work_and_is_well() -> None:
    it = Watched(Heartbeat("engine"))
    await it.look()
    assert it.published == []
    it.is_stopping = True
    assert await it.look(3) == ()
    assert it.published == [False]
    it.watch.require_healthy()


async def test_nothing_is_published_any_more_once_it_is_closed() -> None:
    heartbeat = Heartbeat("engine")
    it = Watched(heartbeat)
    await it.watch.close()
    heartbeat.stop()
    await it.look()
    assert it.published == []
    it.now_s += 2 * LIMIT_S


async def test_a_publish_that_blocks_holds_up_no_look() -> None:
    """Ray's head is asked without a time limit."""
    looks, told = threading.Semaphore(0), Wedge()

    class Seen:
        @property
        def is_serving(self) -> bool:
            looks.release()
            return True

    heartbeat = Heartbeat("engine")
    watch = Watch(
        (heartbeat,),
        {Component.METRICS_SERVER: Seen()},
        limit_s=LIMIT_S,
        metrics=HealthMetrics(CollectorRegistry()),
        publish=told,
    )
    heartbeat.stop()
    watch.start()
    await told.begun()
    for _ in range(3):
        assert await asyncio.to_thread(looks.acquire, timeout=PATIENCE_S)
    told.let_go()
    await watch.close()
    assert not watch._teller.is_alive()
