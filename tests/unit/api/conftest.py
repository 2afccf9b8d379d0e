"""One server for all tests of the gateway, with SmolLM2's tokenizer and a backend that each test scripts anew."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from fake_backend import FakeBackend
from http_server import serving
from inference_server import Inference, client_of

from shoal.api.backend import GatewayObserver
from shoal.api.http_app import create_app
from shoal.api.intake import Services
from shoal.api.tokenizer import Tokenizer
from shoal.api.validation import ServedModel
from shoal.config import GatewayConfig
from shoal.model.files import locate
from shoal.wire.messages import TtftStages

CONTEXT = 400
CONFIG = GatewayConfig(max_body_bytes=200_000, max_prompts=4, max_values=16_384)


@dataclass
class Recorder(GatewayObserver):
    """Keeps what it is told, newest last."""

    started: int = 0
    finished: list[tuple[str, str, int, str]] = field(default_factory=list)
    first: list[tuple[float, float, TtftStages]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    last: list[tuple[float, int]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    deepened: list[str] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_finished(self, timeout_s: float = 10) -> None:
        """Clients have their answers a moment before the observer hears of it: wait until it has, at least once."""
        with self._changed:
            assert self._changed.wait_for(lambda: 0 < len(self.finished) == self.started, timeout_s)

    def request_started(self) -> None:
        self.started += 1

    def request_finished(
        self, model: str, endpoint: str, status: int, duration_s: float, error_type: str = "none"
    ) -> None:
        assert duration_s >= 0
        with self._changed:
            self.finished.append((model, endpoint, status, error_type))
            self._changed.notify_all()

    def first_token(self, ttft_s: float, gateway_s: float, stages: TtftStages) -> None:
        self.first.append((ttft_s, gateway_s, stages))

    def next_token(self, since_last_s: float) -> None:
        self.gaps.append(since_last_s)

    def last_token(self, since_first_s: float, num_tokens: int) -> None:
        self.last.append((since_first_s, num_tokens))

    def rejected(self, reason: str) -> None:
        self.refusals.append(reason)

    def cancelled(self, stage: str) -> None:
        self.gone.append(stage)

    def needed_full_depth(self, reason: str) -> None:
        self.deepened.append(reason)

    def retried(self, reason: str) -> None:
        raise AssertionError("nothing dies here")


@dataclass(frozen=True)
class Gateway:
    """A running gateway and what stands behind it."""

    url: str
    backend: FakeBackend
    observer: Recorder
    http: httpx.Client
    openai: openai.OpenAI

    def post(self, path: str, body: object = None, **options: object) -> httpx.Response:
        return self.http.post(path, json=body, **options)  # type: ignore[arg-type]


def renew(old: object, new: object) -> None:
    """The running server keeps its objects; each test sees them as they are at the start."""
    vars(old).clear()
    vars(old).update(vars(new))


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """transformers' tokenizer."""
    return locate("smollm2").tokenizer()


@pytest.fixture(scope="session")
def tokenizer(smollm2: Any) -> Iterator[Tokenizer]:
    ours = Tokenizer(smollm2)
    yield ours
    ours.close()


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> ServedModel:
    return ServedModel("smollm2", CONTEXT, tokenizer.vocab_size, created_s=1_750_000_000)


@pytest.fixture(scope="session")
def running(smollm2: Any, tokenizer: Tokenizer, model: ServedModel) -> Iterator[Gateway]:
    def encode(text: str) -> list[int]:
        ids: list[int] = smollm2.encode(text, add_special_tokens=False)
        return ids

    backend, observer = FakeBackend(encode, tokenizer.decode), Recorder()

    async def targets() -> list[object]:
        return [{"targets": ["127.0.0.1:22001"], "labels": {"role": "decode"}}]

    app = create_app(
        Services(backend, tokenizer, (model,), CONFIG, observer),
        metrics_text=lambda: b"shoal_requests_in_flight 0\n", metrics_targets=targets,
    )  # fmt: skip
    with serving(app) as url, httpx.Client(base_url=url, timeout=20) as http:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
        yield Gateway(url, backend, observer, http, client)
        client.close()


@pytest.fixture
def gateway(running: Gateway) -> Iterator[Gateway]:
    """The server with a backend and an observer as if new. Nothing may run when a test is over."""
    renew(running.backend, FakeBackend(running.backend.encode, running.backend.decode))
    renew(running.observer, Recorder())
    yield running
    if running.observer.started:
        running.observer.wait_finished()
    assert running.backend.num_running == 0


@pytest.fixture
def services(smollm2: Any, tokenizer: Tokenizer, model: ServedModel) -> Services:
    """Of a gateway with a backend and an observer of its own."""
    return services_of(smollm2, tokenizer, model)


@pytest.fixture(scope="module")
def module_services(smollm2: Any, tokenizer: Tokenizer, model: ServedModel) -> Services:
    """The same for all examples of a module."""
    return services_of(smollm2, tokenizer, model)


def services_of(smollm2: Any, tokenizer: Tokenizer, model: ServedModel) -> Services:
    backend = FakeBackend(lambda text: list(smollm2.encode(text, add_special_tokens=False)), tokenizer.decode)
    return Services(backend, tokenizer, (model,), CONFIG, Recorder())


@pytest.fixture
async def inference(services: Services) -> AsyncIterator[Inference]:
    """A gRPC server and its client. Nothing may run when a test is over."""
    async with client_of(services) as client:
        yield client
    assert client.backend.num_running == 0
    assert len(client.observer.finished) == client.observer.started
