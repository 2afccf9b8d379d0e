"""What requests' bodies may take of memory, for the process and for each key, by real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from inference_server import TIMEOUT_S, Inference, client_of, request, told

from shoal.api import bodies, deadline, endpoint
from shoal.api.access import ANYBODY
from shoal.api.http_app import create_app
from shoal.api.http_server import HttpServer
from shoal.api.inference import SERVICE_NAME
from shoal.api.intake import Services
from shoal.api.keys import Keyring, KeysFile, digest_of, new_key, write_keys
from shoal.v1 import inference_pb2 as pb

BODY = {"model": "smollm2", "prompt": [5, 6, 7], "max_tokens": 2}
KEYS = {name: new_key() for name in ("alice", "bob", "carol")}
LONGEST = 200_000
OVERLOADED = (429, "overloaded")
RATE_LIMITED = (429, "rate_limit_exceeded")


@pytest.fixture
def limited(services: Services, tmp_path: Path) -> Services:
    """Two of the longest bodies are held at once, one of them a key's."""
    tenants = {name: {"keys": {key_id: digest_of(key)}} for name, (key, key_id) in KEYS.items()}
    write_keys(tmp_path / "keys.yaml", KeysFile.model_validate({"tenants": tenants}))
    config = services.config.model_copy(
        update={"max_bodies": 2, "max_key_bodies": 1, "max_body_bytes": LONGEST, "reflection": False}
    )
    return replace(services, config=config, keyring=Keyring(tmp_path / "keys.yaml"))


@pytest.fixture
async def http(limited: Services) -> AsyncIterator[httpx.AsyncClient]:
    server = HttpServer(create_app(limited))
    port = await server.start("127.0.0.1", 0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        yield client
    await server.stop()


@pytest.fixture
async def inference(limited: Services) -> AsyncIterator[Inference]:
    async with client_of(limited) as client:
        yield client


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name][0]}"}


async def held(services: Services, num_bytes: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while services.bodies.num_bytes != num_bytes:
            await asyncio.sleep(0)


async def begin(http: httpx.AsyncClient, name: str, length: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request that sends no body, of which its header says ``length``."""
    reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
    authorization = bearer(name)["authorization"]
    head = f"POST /v1/completions HTTP/1.1\r\nhost: here\r\nauthorization: {authorization}\r\n{length}\r\n\r\n"
    writer.write(head.encode())
    await writer.drain()
    return reader, writer


async def refusal(http: httpx.AsyncClient, name: str) -> tuple[int, str] | None:
    answer = await http.post("/v1/completions", json=BODY, headers=bearer(name))
    return None if answer.status_code == 200 else (answer.status_code, answer.json()["error"]["code"])


@pytest.mark.parametrize("length", [f"content-length: {LONGEST}", "transfer-encoding: chunked"])
async def test_a_body_that_comes_counts_as_long_as_it_may_be(
    http: httpx.AsyncClient, limited: Services, length: str
) -> None:
    _, alice = await begin(http, "alice", length)
    await held(limited, LONGEST)
    assert await refusal(http, "alice") == RATE_LIMITED
    assert await refusal(http, "bob") is None
    _, bob = await begin(http, "bob", length)
    await held(limited, 2 * LONGEST)
    assert await refusal(http, "carol") == OVERLOADED
    assert limited.observer.refusals == [RATE_LIMITED[1], OVERLOADED[1]]  # type: ignore[attr-defined]
    for writer in (alice, bob):
        writer.close()
    await held(limited, 0)
    assert await refusal(http, "carol") is None


async def test_who_is_one_too_many_is_told_so_before_it_sends(http: httpx.AsyncClient, limited: Services) -> None:
    [mine] = [tenant for name, tenant in limited.keyring._tenants.items() if name == "alice"]  # type: ignore[union-attr]
    with limited.bodies.held(mine, LONGEST):
        reader, writer = await begin(http, "alice", "content-length: 100")
        assert (await asyncio.wait_for(reader.readline(), TIMEOUT_S)).split()[1] == b"429"
        writer.close()


async def test_a_body_counts_by_its_bytes_until_it_is_answered(http: httpx.AsyncClient, limited: Services) -> None:
    backend: Any = limited.backend
    backend.hold_after = 0
    raw = b'{"model": "smollm2", "prompt": [5, 6, 7], "max_tokens": 2}'
    asking = asyncio.create_task(http.post("/v1/completions", content=raw, headers=bearer("alice")))
    await asyncio.to_thread(backend.held.acquire, timeout=TIMEOUT_S)
    assert limited.bodies.num_bytes == len(raw)
    backend.release()
    assert (await asking).status_code == 200
    await held(limited, 0)


async def test_a_slow_sender_is_cut_off_by_the_length_of_its_body(
    http: httpx.AsyncClient, limited: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadline, "GRACE_S", 0)
    monkeypatch.setattr(endpoint, "BODY_S", 0)
    monkeypatch.setattr(endpoint, "SLOWEST_BYTES_PER_S", 1000)
    long, sender = await begin(http, "alice", f"content-length: {LONGEST}")  # it has 200 seconds
    await held(limited, LONGEST)
    short, other = await begin(http, "bob", "content-length: 100")
    assert (await asyncio.wait_for(short.readline(), TIMEOUT_S)).split()[1] == b"504"
    assert limited.bodies.num_bytes == LONGEST and not long.at_eof()
    for writer in (sender, other):
        writer.close()
    await held(limited, 0)


# --- gRPC -----------------------------------------------------------------------------------------------


async def reading(services: Services, num: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while services.bodies._turns._value != services.config.max_bodies - num:
            await asyncio.sleep(0)


async def begin_call(client: Inference, name: str, method: str) -> Any:
    """A call that sends no message."""
    return client.channel.stream_stream(f"/{SERVICE_NAME}/{method}")(metadata=tuple(bearer(name).items()))


METHODS = ["Generate", "ListModels"]


@pytest.mark.parametrize("method", METHODS)
async def test_messages_are_read_in_turn_for_the_process_and_each_key(
    inference: Inference, limited: Services, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def code_for(name: str) -> grpc.StatusCode:
        send = inference.channel.unary_unary(f"/{SERVICE_NAME}/{method}")
        message = request().SerializeToString() if method == "Generate" else b""
        code: grpc.StatusCode = await send(message, timeout=TIMEOUT_S, metadata=tuple(bearer(name).items())).code()
        return code

    alice = await begin_call(inference, "alice", method)
    await reading(limited, 1)
    assert await code_for("bob") == grpc.StatusCode.OK
    monkeypatch.setattr(bodies, "TURN_S", 0.05)
    assert await code_for("alice") == grpc.StatusCode.RESOURCE_EXHAUSTED
    bob = await begin_call(inference, "bob", method)
    await reading(limited, 2)
    assert await code_for("carol") == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert limited.observer.refusals == ["overloaded"] * 2  # type: ignore[attr-defined]
    for call in (alice, bob):
        call.cancel()
    await reading(limited, 0)
    assert await code_for("carol") == grpc.StatusCode.OK


async def test_of_many_messages_at_once_each_gets_its_turn(inference: Inference, limited: Services) -> None:
    metadata = tuple(bearer("alice").items())
    calls = [inference.stub.Generate(request(token_ids=pb.TokenIds(ids=[5])), metadata=metadata) for _ in range(50)]
    assert {await call.code() for call in calls} == {grpc.StatusCode.OK}
    assert limited.bodies.num_bytes == 0


async def test_a_message_counts_until_it_is_answered(inference: Inference, limited: Services) -> None:
    [mine] = [tenant for name, tenant in limited.keyring._tenants.items() if name == "alice"]  # type: ignore[union-attr]
    metadata = tuple(bearer("alice").items())
    with limited.bodies.held(mine, LONGEST), pytest.raises(grpc.aio.AioRpcError) as refused:
        await inference.stub.Generate(request(), metadata=metadata, timeout=TIMEOUT_S)
    assert told(refused.value)[:2] == RATE_LIMITED
    backend: Any = limited.backend
    backend.hold_after = 0
    call = inference.stub.Generate(request(), metadata=metadata, timeout=TIMEOUT_S)
    await held(limited, len(request().SerializeToString()))
    backend.release()
    assert await call.code() == grpc.StatusCode.OK
    await held(limited, 0)


def test_without_keys_the_process_limit_alone_binds(limited: Services) -> None:
    with limited.bodies.held(ANYBODY, 2 * LONGEST):
        assert limited.bodies.num_bytes == 2 * LONGEST
