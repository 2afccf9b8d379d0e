"""grpc.health.v1, for probes and load balancers."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from inference_server import TIMEOUT_S, Inference, client_of

from shoal.api import health
from shoal.api.backend import Readiness
from shoal.api.inference import SERVICE_NAME
from shoal.api.intake import Services
from shoal.errors import PeerGone

Status = health_pb2.HealthCheckResponse
NAMES = ["", SERVICE_NAME]


def asked(name: str) -> Any:
    return health_pb2.HealthCheckRequest(service=name)


@pytest.fixture
def stub(inference: Inference) -> Any:
    return health_pb2_grpc.HealthStub(inference.channel)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("now", "status"),
    [
        (Readiness(num_decode=1, num_prefill=1), Status.SERVING),
        (Readiness(num_decode=1, num_prefill=0), Status.SERVING),
        (Readiness(num_decode=0, num_prefill=1), Status.NOT_SERVING),
    ],
    ids=str,
)
async def test_the_server_serves_while_decode_is_ready(
    inference: Inference, stub: Any, name: str, now: Readiness, status: Any
) -> None:
    inference.backend.readiness_now = now
    assert (await stub.Check(asked(name), timeout=TIMEOUT_S)).status == status


async def test_another_service_is_not_known(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Check(asked("shoal.v1.HandoffService"), timeout=TIMEOUT_S)
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    call = stub.Watch(asked("shoal.v1.HandoffService"), timeout=TIMEOUT_S)
    assert (await call.read()).status == Status.SERVICE_UNKNOWN


@pytest.mark.parametrize("name", NAMES)
async def test_whoever_watches_is_told_of_changes_alone(
    inference: Inference, stub: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_WATCH_PERIOD_S", 0.01)
    call = stub.Watch(asked(name), timeout=TIMEOUT_S)
    assert (await call.read()).status == Status.SERVING
    for num_decode, status in [(0, Status.NOT_SERVING), (1, Status.SERVING)]:
        inference.backend.readiness_now = Readiness(num_decode, num_prefill=1)
        assert (await call.read()).status == status
    call.cancel()


async def test_while_readiness_isnt_known_nothing_serves(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_WATCH_PERIOD_S", 0.01)
    answers: list[Readiness | Exception] = [ConnectionError("secret detail"), Readiness(1, 1)]

    async def readiness() -> Readiness:
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    monkeypatch.setattr(services.backend, "readiness", readiness)
    async with client_of(services) as inference:
        stub = health_pb2_grpc.HealthStub(inference.channel)
        watch = stub.Watch(asked(""), timeout=TIMEOUT_S)
        assert (await stub.Check(asked(""), timeout=TIMEOUT_S)).status == Status.NOT_SERVING
        assert (await watch.read()).status == Status.NOT_SERVING
        answers.pop(0)
        assert (await stub.Check(asked(""), timeout=TIMEOUT_S)).status == Status.SERVING
        assert (await watch.read()).status == Status.SERVING
        watch.cancel()


async def test_nothing_serves_where_a_thread_of_the_gateway_hangs(services: Services) -> None:
    def hangs() -> None:
        raise PeerGone("this replica is being replaced: tokenizer stopped working")

    async with client_of(replace(services, require_healthy=hangs)) as inference:
        stub = health_pb2_grpc.HealthStub(inference.channel)
        assert (await stub.Check(asked(""), timeout=TIMEOUT_S)).status == Status.NOT_SERVING


@pytest.mark.parametrize("limit", ["_MAX_WATCHERS", "_MAX_WATCHERS_OF_PEER"])
async def test_one_watcher_too_many_is_refused_until_another_leaves(
    services: Services, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, limit, 2)
    async with client_of(services) as inference:
        await one_too_many(inference)


async def one_too_many(inference: Inference) -> None:
    stub = health_pb2_grpc.HealthStub(inference.channel)
    first, second = (stub.Watch(asked(""), timeout=TIMEOUT_S) for _ in range(2))
    for one in (first, second):
        assert (await one.read()).status == Status.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Watch(asked(""), timeout=TIMEOUT_S).read()
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert inference.observer.refusals == ["overloaded"]
    assert (await stub.Check(asked(""), timeout=TIMEOUT_S)).status == Status.SERVING
    first.cancel()
    status = None
    async with asyncio.timeout(TIMEOUT_S):
        while status is None:  # until the server has heard that it left
            with suppress(grpc.aio.AioRpcError):
                third = stub.Watch(asked(""), timeout=TIMEOUT_S)
                status = (await third.read()).status
    assert status == Status.SERVING
