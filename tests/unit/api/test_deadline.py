"""Decode that doesn't keep the deadline, and clients that don't: the gateway does, and lets go of them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import grpc.aio
import pytest
from inference_server import request as grpc_request
from token_streams import Joined, Running, joined

from shoal.api import deadline
from shoal.api.backend import Route
from shoal.api.http_app import create_app
from shoal.api.inference import SERVICE_NAME, InferenceService
from shoal.api.intake import Services
from shoal.api.tokenizer import MAX_INLINE_CHARS, Tokenizer
from shoal.cluster import gateway_replica
from shoal.cluster.balancer import Balancer
from shoal.cluster.gateway_replica import PoolBackend
from shoal.config import ShoalConfig
from shoal.errors import DeadlineExceeded, Unavailable
from shoal.wire.messages import Depth, GenerateRequest, RequestContext, SamplingParams, TokenOutput

OUTPUT = TokenOutput(0, (1,), "a")


class Living:
    """Who of the decode pool lives."""

    def __init__(self, both: Joined, *names: str) -> None:
        self._place = both.decode.place
        self._names = frozenset(names)

    async def ids(self) -> frozenset[str]:
        return self._names

    def key_of(self, _replica_id: str) -> bytes:
        return self._place.server_id

    def address_of(self, _replica_id: str) -> str:
        return self._place.address


@dataclass
class Asked:
    """An answer whose first output is here, and what decode has of it."""

    answer: AsyncGenerator[TokenOutput, None]
    running: Running
    both: Joined

    async def is_let_go(self) -> None:
        """Nothing of it is left on either end."""
        async with asyncio.timeout(10):
            while self.running.is_open:
                await asyncio.sleep(0)
        assert not self.both.client._open


@asynccontextmanager
async def begun(timeout_s: float) -> AsyncIterator[Asked]:
    async with joined() as both:
        request = GenerateRequest(RequestContext("id", timeout_s), "tiny", (1,), Depth.FULL, SamplingParams(4))
        pool = PoolBackend(ShoalConfig(), Living(both, "a"), both.client, Balancer())  # type: ignore[arg-type]
        answer = pool.generate(request, Route())
        first = asyncio.ensure_future(anext(answer))
        running = await both.decode.came.get()
        running.outlet.send(OUTPUT)
        assert await first == OUTPUT
        yield Asked(answer, running, both)
        await answer.aclose()


async def test_decode_that_doesnt_answer_is_cancelled_a_moment_after_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gateway_replica, "_GRACE_S", 0.02)
    async with begun(timeout_s=0.5) as asked:
        assert asked.running.is_open
        with pytest.raises(DeadlineExceeded):
            await anext(asked.answer)
        await asked.is_let_go()


async def test_the_deadline_is_one_for_all_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_replica, "_GRACE_S", 0.02)
    async with begun(timeout_s=0.5) as asked:

        async def go_on() -> None:
            while True:
                asked.running.outlet.send(OUTPUT)
                assert await anext(asked.answer) == OUTPUT

        with pytest.raises(DeadlineExceeded):
            await asyncio.wait_for(go_on(), 10)
        await asked.is_let_go()


async def test_decode_is_cancelled_when_the_answer_is_closed() -> None:
    async with begun(timeout_s=60) as asked:
        await asked.answer.aclose()
        await asked.is_let_go()


async def test_without_a_decode_replica_nobody_waits_for_one() -> None:
    async with joined() as both:
        pool = PoolBackend(ShoalConfig(), Living(both), both.client, Balancer())  # type: ignore[arg-type]
        request = GenerateRequest(RequestContext("id", 60), "tiny", (1,), Depth.FULL, SamplingParams(4))
        with pytest.raises(Unavailable, match="no decode replica") as refused:
            await anext(pool.generate(request, Route()))
    assert refused.value.retry_after_s == 1


# --- clients ----------------------------------------------------------------------------------------------


@pytest.fixture
def hurried(services: Services, monkeypatch: pytest.MonkeyPatch) -> Services:
    """Services under which nothing takes longer than a moment."""
    monkeypatch.setattr(deadline, "GRACE_S", 0.1)
    return replace(services, config=services.config.model_copy(update={"deadline_s": 0.2}))


async def asked(
    services: Services, *, reads: bool = True, sends: bool = True, headers: dict[str, str] | None = None, **fields: Any
) -> list[Any]:
    """What a client is sent that leaves out the end of its request, or stops reading its answer as it begins."""
    asks = fields or {"prompt": "Hello"}
    body = json.dumps({"model": "smollm2", "max_tokens": 50, "stream": True, **asks}).encode()
    coming = [{"type": "http.request", "body": body, "more_body": not sends}]
    said: list[Any] = []

    async def receive() -> Any:
        if not coming:
            await asyncio.Event().wait()
        return coming.pop()

    async def send(message: Any) -> None:
        said.append(message)
        if not reads and message["type"] == "http.response.body":
            await asyncio.Event().wait()

    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    path = "/v1/completions" if "prompt" in asks else "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "headers": raw, "query_string": b"", "root_path": ""}
    await asyncio.wait_for(create_app(services)(scope, receive, send), 10)
    return said


def was_late(services: Services) -> bool:
    """Whether the one request was, and holds nothing any more."""
    backend: Any = services.backend
    observer: Any = services.observer
    assert backend.num_running == services.places.num_taken == 0
    [(_, _, status, error_type)] = observer.finished
    return bool((status, error_type) == (504, "timeout_error"))


@pytest.mark.parametrize("headers", [{}, {"x-shoal-timeout": "0.1"}], ids=["ours", "the client's"])
async def test_a_request_that_doesnt_come_to_its_end_is_answered_at_its_deadline(
    hurried: Services, headers: dict[str, str]
) -> None:
    config = hurried.config.model_copy(update={"deadline_s": 60.0 if headers else 0.2})
    services = replace(hurried, config=config)
    said = await asked(services, reads=True, sends=False, headers=headers)
    assert said[0]["status"] == 504 and was_late(services)


async def test_a_request_whose_time_is_over_before_it_is_understood_reaches_no_pool(services: Services) -> None:
    said = await asked(services, reads=True, sends=True, headers={"x-shoal-timeout": "1e-300"})
    assert said[0]["status"] == 504 and was_late(services)
    assert not services.backend.requests  # type: ignore[attr-defined]


async def test_a_client_that_stops_reading_holds_no_place_beyond_its_deadline(hurried: Services) -> None:
    said = await asked(hurried, reads=False, sends=True)
    assert [message["type"] for message in said] == ["http.response.start", "http.response.body"]
    assert was_late(hurried)


class Deaf:
    """A call by gRPC, without a deadline of its own, whose client reads nothing."""

    code: grpc.StatusCode | None = None

    async def read(self) -> bytes:
        return grpc_request(max_tokens=50).SerializeToString()

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> None:
        return None

    async def send_initial_metadata(self, _metadata: Any) -> None:
        pass

    async def write(self, _message: Any) -> None:
        await asyncio.Event().wait()

    async def abort(self, code: grpc.StatusCode, _details: str, **_others: Any) -> None:
        self.code = code
        raise grpc.aio.AbortError


async def test_a_client_of_grpc_that_stops_reading_holds_no_place_beyond_the_deadline(hurried: Services) -> None:
    call, method = Deaf(), InferenceService(hurried)._generate_stream
    with hurried.access.admitted(f"/{SERVICE_NAME}/GenerateStream", ()), pytest.raises(grpc.aio.AbortError):
        await asyncio.wait_for(method(None, call), 10)  # type: ignore[arg-type]
    assert call.code is grpc.StatusCode.DEADLINE_EXCEEDED and was_late(hurried)


LONG = "word " * MAX_INLINE_CHARS
"""More than is encoded on the event loop."""


@pytest.fixture
def stuck(hurried: Services, smollm2: Any) -> Iterator[Services]:
    """Services whose tokenizer is at something else, and comes to no end of it."""
    tokenizer, ends = Tokenizer(smollm2), threading.Event()
    tokenizer._thread.submit(ends.wait)
    yield replace(hurried, tokenizer=tokenizer)
    ends.set()
    tokenizer.close()


@pytest.mark.parametrize(
    "asks", [{"prompt": LONG}, {"messages": [{"role": "user", "content": LONG}]}], ids=["prompt", "messages"]
)
async def test_a_prompt_that_is_not_encoded_in_time_holds_no_place_beyond_its_deadline(
    stuck: Services, asks: dict[str, Any]
) -> None:
    said = await asked(stuck, **asks)
    assert said[0]["status"] == 504 and was_late(stuck)
    assert not stuck.backend.requests  # type: ignore[attr-defined]
