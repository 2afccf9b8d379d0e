"""Who is let in, at every path and every method: with the right key, and nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc.aio
import httpx
import pytest
from fake_backend import FakeBackend
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2
from inference_server import TIMEOUT_S, client_of, request, told
from structlog.testing import capture_logs

from shoal.api.access import OPEN
from shoal.api.http_app import create_app
from shoal.api.inference import SERVICE_NAME
from shoal.api.intake import Services
from shoal.api.keys import Keyring, KeysFile, digest_of, new_key, write_keys
from shoal.errors import Overloaded
from shoal.v1 import inference_pb2 as pb

BODY = {"model": "smollm2", "prompt": "Hello", "max_tokens": 3}
POLICIES: dict[str, Any] = {
    "asker": {},
    "watcher": {"roles": ["metrics"]},
    "one-at-a-time": {"max_running": 1},
    "few-at-a-time": {"max_running": 3},
    "small": {"max_kv_tokens": 20},
}
KEYS = {name: new_key() for name in POLICIES}


@pytest.fixture
def guarded(services: Services, tmp_path: Path) -> Services:
    """Services that want one of the keys."""
    tenants = {name: {**POLICIES[name], "keys": {key_id: digest_of(key)}} for name, (key, key_id) in KEYS.items()}
    write_keys(tmp_path / "keys.yaml", KeysFile.model_validate({"tenants": tenants}))
    return replace(services, keyring=Keyring(tmp_path / "keys.yaml"))


@pytest.fixture
async def http(guarded: Services) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(guarded, metrics_text=lambda: b"shoal_requests_in_flight 0\n")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name][0]}"}


def routes(services: Services) -> list[tuple[str, str]]:
    """Every method of every path that the application has."""
    return [
        (method, route.path.replace("{name:path}", "smollm2"))  # type: ignore[attr-defined]
        for route in create_app(services).routes
        for method in sorted(route.methods)  # type: ignore[attr-defined]
    ]


async def test_without_a_key_only_probes_are_answered(http: httpx.AsyncClient, guarded: Services):
    paths = [
        *routes(guarded),
        ("GET", "/"),
        ("GET", "/docs"),
        ("GET", "/health/"),
        ("PUT", "/v1/x"),
    ]
    assert len(paths) > 12
    for method, path in paths:
        answer = await http.request(method, path, json=BODY if method == "POST" else None)
        if path in OPEN:
            assert answer.status_code in {200, 503}, path
            continue
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), (method, path)
        if method != "HEAD":
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.json()["error"]["type"] == "authentication_error"
    assert set(guarded.observer.refusals) == {"invalid_api_key"}  # type: ignore[attr-defined]
    assert not guarded.backend.requests  # type: ignore[attr-defined]


async def test_who_is_refused_is_logged_by_where_it_comes_from_and_not_without_end(
    http: httpx.AsyncClient, guarded: Services
):
    with capture_logs() as logs:
        for _ in range(30):
            await http.get("/version", headers={"authorization": "Bearer sk-shoal-guessed-secret"})
        async with client_of(guarded) as client:  # it has limits of its own
            with pytest.raises(grpc.aio.AioRpcError):
                await client.stub.Generate(request(), timeout=TIMEOUT_S)
    refused = [log for log in logs if log["log_level"] == "warning"]
    assert {log["code"] for log in refused} == {"invalid_api_key"} and "guessed" not in str(logs)
    assert 20 <= sum(log["peer"] == "127.0.0.1" for log in refused) < 30
    assert sum(log["peer"].startswith("ipv4:127.0.0.1:") for log in refused) == 1


async def test_what_was_refused_is_logged_with_whose_it_was(http: httpx.AsyncClient):
    with capture_logs() as logs:
        await http.post("/v1/completions", json=BODY | {"max_tokens": -1}, headers=bearer("asker"))
        await http.post("/v1/completions", json=BODY, headers=bearer("watcher"))
    [bad] = (log for log in logs if log["event"] == "request answered")
    assert (bad["status"], bad["tenant"]) == (400, "asker") and "model" not in bad
    [forbidden] = (log for log in logs if log["log_level"] == "warning")
    assert (forbidden["code"], forbidden["tenant"]) == ("permission_denied", "watcher")


async def test_a_key_opens_what_its_roles_say(http: httpx.AsyncClient):
    asked = await http.post("/v1/completions", json=BODY, headers=bearer("asker"))
    assert asked.status_code == 200, asked.text
    for path in ("/metrics", "/metrics/targets"):
        assert (await http.get(path, headers=bearer("asker"))).status_code == 403
        assert (await http.get(path, headers=bearer("watcher"))).status_code == 200
    refused = await http.post("/v1/completions", json=BODY, headers=bearer("watcher"))
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "permission_denied"
    for name in ("asker", "watcher"):
        assert (await http.get("/version", headers=bearer(name))).status_code == 200
        assert (await http.get("/openapi.json", headers=bearer(name))).status_code == 200
        assert (await http.get("/nowhere", headers=bearer(name))).status_code == 404


async def test_a_prefix_before_all_paths_changes_nothing(guarded: Services):
    """As Serve's route_prefix makes it: what is routed is the path without it."""
    app = create_app(guarded, metrics_text=lambda: b"")
    transport = httpx.ASGITransport(app, root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://test/llm") as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.post("/v1/completions", json=BODY, headers=bearer("watcher"))).status_code == 403
        assert (await http.get("/metrics", headers=bearer("asker"))).status_code == 403
        assert (await http.post("/v1/completions", json=BODY, headers=bearer("asker"))).status_code == 200


async def test_two_keys_at_once_are_none(http: httpx.AsyncClient, guarded: Services):
    both = [("authorization", bearer(name)["authorization"]) for name in ("asker", "watcher")]
    for headers in (both, both[::-1]):
        assert (await http.get("/version", headers=headers)).status_code == 401
    async with client_of(guarded) as client:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.stub.Generate(request(), timeout=TIMEOUT_S, metadata=tuple(both))
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_request_is_its_tenant_s(http: httpx.AsyncClient, guarded: Services):
    """The pools share K/V within a tenant alone, so what they are told is what the key says, and nothing else."""
    for name in ("asker", "one-at-a-time"):
        await http.post("/v1/completions", json=BODY, headers=bearer(name) | {"x-tenant": "watcher"})
    found = [one.context.tenant for one in guarded.backend.requests]  # type: ignore[attr-defined]
    assert found == ["asker", "one-at-a-time"]


async def test_more_at_once_than_a_tenant_may_is_refused_and_others_go_on(http: httpx.AsyncClient, guarded: Services):
    [mine] = [tenant for name, tenant in guarded.keyring._tenants.items() if name == "one-at-a-time"]  # type: ignore[union-attr]
    with mine.running():
        refused = await http.post("/v1/completions", json=BODY, headers=bearer("one-at-a-time"))
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert (await http.post("/v1/completions", json=BODY, headers=bearer("asker"))).status_code == 200
    for stream in (False, True):  # what ended, however it was answered, counts no more
        body = BODY | {"stream": stream}
        assert (await http.post("/v1/completions", json=body, headers=bearer("one-at-a-time"))).status_code == 200
    assert (await http.post("/v1/completions", json={}, headers=bearer("one-at-a-time"))).status_code == 400
    assert mine.num_running == 0


async def test_each_prompt_of_a_request_counts(services: Services, http: httpx.AsyncClient, guarded: Services):
    tenants = guarded.keyring._tenants  # type: ignore[union-attr]
    mine = tenants["few-at-a-time"]
    three, headers = BODY | {"prompt": ["a", "b", "c"]}, bearer("few-at-a-time")
    assert (await http.post("/v1/completions", json=three, headers=headers)).status_code == 200
    with mine.running():
        refused = await http.post("/v1/completions", json=three, headers=headers)
        assert refused.status_code == 429 and "has 3 prompts" in refused.json()["error"]["message"]
    with mine.running(), mine.running():
        refused = await http.post("/v1/completions", json=three, headers=headers)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "2"  # two must leave
    never = await http.post("/v1/completions", json=BODY | {"prompt": ["a", "b", "c", "d"]}, headers=headers)
    assert never.status_code == 400 and "4 prompts in one request" in never.json()["error"]["message"]
    assert mine.num_running == 0

    services = replace(services, config=services.config.model_copy(update={"max_running": 3}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(services)), base_url="http://test") as client:
        with services.places.taken():
            for _ in range(10):  # who is sent away leaves at once, which says nothing of when there's room
                refused = await client.post("/v1/completions", json=three)
                assert refused.status_code == 429 and refused.json()["error"]["code"] == "overloaded"
                assert refused.headers["retry-after"] == "1"
            assert services.places.wait_s() == mine._places.wait_s() == 1.0
            with services.places.taken():
                refused = await client.post("/v1/completions", json=three)
                assert refused.status_code == 429 and refused.headers["retry-after"] == "2"
        assert (await client.post("/v1/completions", json=three)).status_code == 200
        never = await client.post("/v1/completions", json=three | {"prompt": ["a"] * 4})
        assert never.status_code == 400 and never.json()["error"]["param"] == "prompt"
    assert services.places.num_taken == 0


async def test_what_decode_has_no_room_for_says_nothing_of_how_long_others_take(services: Services):
    backend = cast(FakeBackend, services.backend)
    backend.fail_after, backend.error = 0, Overloaded("out of blocks")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(services)), base_url="http://test") as client:
        for _ in range(10):
            assert (await client.post("/v1/completions", json=BODY)).status_code == 429
        assert services.places.wait_s() == 1.0  # as if nobody had been here
        backend.fail_after = None
        for _ in range(8):
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        assert services.places.wait_s() < 1.0


async def test_no_more_requests_are_worked_on_than_may_be(services: Services):
    services = replace(services, config=services.config.model_copy(update={"max_running": 2}))
    transport = httpx.ASGITransport(create_app(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        with services.places.taken(), services.places.taken():
            refused = await client.post("/v1/completions", json=BODY)
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "overloaded"
            assert refused.headers["retry-after"] == "1"
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    assert services.places.num_taken == 0


async def test_more_tokens_than_a_tenant_may_have_are_refused(http: httpx.AsyncClient, guarded: Services):
    [mine] = [tenant for name, tenant in guarded.keyring._tenants.items() if name == "small"]  # type: ignore[union-attr]
    asked = BODY | {"prompt": [5, 6, 7], "max_tokens": 4, "n": 2}  # 11 tokens
    with mine.holding(9):
        assert (await http.post("/v1/completions", json=asked, headers=bearer("small"))).status_code == 200
    with mine.holding(10):
        refused = await http.post("/v1/completions", json=asked, headers=bearer("small"))
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    never = await http.post("/v1/completions", json=asked | {"max_tokens": 9}, headers=bearer("small"))
    assert never.status_code == 400 and "21 tokens" in never.json()["error"]["message"]
    assert mine.num_kv_tokens == 0


METHODS = pb.DESCRIPTOR.services_by_name["InferenceService"].methods
GENERATING = {f"/{SERVICE_NAME}/{one.name}" for one in METHODS if one.input_type.name == "GenerateRequest"}
REFLECTION = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
# Every method that wants a key, with a message for it.
KEYED = {
    **{f"/{SERVICE_NAME}/{one.name}": b"" for one in METHODS},
    **dict.fromkeys(GENERATING, request().SerializeToString()),
    f"/{reflection.SERVICE_NAME}/ServerReflectionInfo": REFLECTION,
}


@pytest.mark.parametrize("method", [one.name for one in METHODS])
async def test_by_grpc_who_has_no_key_is_refused_before_a_message_is_read(guarded: Services, method: str):
    async with client_of(guarded) as client:
        call = client.channel.stream_stream(f"/{SERVICE_NAME}/{method}")(timeout=TIMEOUT_S)  # it sends none
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def told_first(channel: grpc.aio.Channel, method: str, message: bytes | None, name: str | None = None) -> Any:
    """A call's first answer. Who is refused sends no message: it may come when the call is over, and grpc.aio then
    makes up a status of its own."""
    metadata = () if name is None else tuple(bearer(name).items())
    sent = None if message is None else iter([message])
    return await channel.stream_stream(method)(sent, timeout=TIMEOUT_S, metadata=metadata).read()


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_by_grpc_health_wants_no_key(guarded: Services, method: str):
    async with client_of(guarded) as client:
        assert await told_first(client.channel, f"/{health.SERVICE_NAME}/{method}", b"")


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_by_grpc_who_has_no_key_is_told_of_health_without_its_message_being_read(
    guarded: Services, method: str
) -> None:
    """So nobody holds anything that a probe needs, and nothing of 8 MiB comes before a key."""
    async with client_of(guarded) as client:
        asking = client.channel.stream_stream(f"/{health.SERVICE_NAME}/{method}")
        waiting = [asking() for _ in range(50)]  # none of them sends a message
        for call in waiting:
            answer = await asyncio.wait_for(call.read(), TIMEOUT_S)
            assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING
            call.cancel()


@pytest.mark.parametrize("method", KEYED)
async def test_by_grpc_a_key_is_wanted(guarded: Services, method: str):
    async with client_of(guarded) as client:
        assert await told_first(client.channel, method, KEYED[method], "asker")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await told_first(client.channel, method, None)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert told(refused.value)[:2] == (401, "invalid_api_key")
        assert [one.context.tenant for one in client.backend.requests] == ["asker"] * (method in GENERATING)


@pytest.mark.parametrize("method", [method for method in KEYED if SERVICE_NAME in method])
async def test_by_grpc_a_key_opens_what_its_roles_say(guarded: Services, method: str):
    async with client_of(guarded) as client:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await told_first(client.channel, method, None, "watcher")
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert not client.backend.requests


async def test_where_no_keys_are_wanted_anybody_may_ask(services: Services):
    app = create_app(services, metrics_text=lambda: b"")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        for headers in ({}, bearer("asker")):
            assert (await http.post("/v1/completions", json=BODY, headers=headers)).status_code == 200
        assert (await http.get("/metrics")).status_code == 200
    assert {one.context.tenant for one in services.backend.requests} == {"default"}  # type: ignore[attr-defined]
