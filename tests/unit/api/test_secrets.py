"""Keys, prompts and answers are in no log line and no metric, however a request ends."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from inference_server import client_of, request
from own_logging import own_logging
from prometheus_client import generate_latest

from shoal.api.http_app import create_app
from shoal.api.intake import Services
from shoal.api.keys import Keyring, KeysFile, digest_of, new_key, write_keys
from shoal.telemetry import GatewayMetrics, configure_logging
from shoal.telemetry.registry import new_registry

COMPLETIONS = "/v1/completions"
PROMPT = "grandmother's recipe for plums"
ANSWER = " Stew them overnight with cloves"
SECRETS = ("grandmother", "plums", "Stew", "cloves")


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that this process logs, as a gateway is set up at its most talkative."""
    stream = io.StringIO()
    with own_logging():
        configure_logging("debug", "json", stream)
        yield stream


def bodies() -> list[dict[str, Any]]:
    """Answered whole and as a stream, and refused for each kind of reason."""
    good = {"model": "smollm2", "prompt": PROMPT, "max_tokens": 20}
    return [
        good,
        good | {"stream": True, "logprobs": 2, "echo": True},
        good | {"model": PROMPT},
        good | {"n": PROMPT},
        good | {PROMPT: 1},
        good | {"prompt": PROMPT * 200},
        good | {"stop": [PROMPT] * 9},
        good | {"user": PROMPT, "metadata": {PROMPT: PROMPT}},
    ]


@pytest.mark.parametrize("defect", [None, ValueError(f"a defect of ours, which quotes {PROMPT}")])
async def test_no_key_prompt_or_answer_is_told(
    services: Services, log: io.StringIO, tmp_path: Path, defect: Exception | None
) -> None:
    key, key_id = new_key()
    wrong = new_key()[0]
    write_keys(
        tmp_path / "keys.yaml", KeysFile.model_validate({"tenants": {"alice": {"keys": {key_id: digest_of(key)}}}})
    )
    registry = new_registry()
    guarded = replace(services, keyring=Keyring(tmp_path / "keys.yaml"), observer=GatewayMetrics(registry, ["smollm2"]))
    backend: Any = guarded.backend
    backend.text = ANSWER
    backend.fail_after, backend.error = (None, None) if defect is None else (2, defect)
    app = create_app(guarded, metrics_text=lambda: generate_latest(registry))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        statuses = set()
        for body in bodies():
            for authorization in (f"Bearer {key}", f"Bearer {wrong}", key, f"Bearer {PROMPT}"):
                headers = {"authorization": authorization, "x-request-id": f"{PROMPT} {key}", "traceparent": PROMPT}
                answer = await http.post(COMPLETIONS, content=json.dumps(body), headers=headers)
                statuses.add(answer.status_code)
        assert (await http.get(f"/v1/models/{PROMPT}", headers={"authorization": key})).status_code == 401
    async with client_of(guarded) as grpc_client:
        for metadata in ((("authorization", f"Bearer {key}"),), (("authorization", f"Bearer {wrong}"),)):
            with suppress(grpc.aio.AioRpcError):
                await grpc_client.stub.Generate(request(text=PROMPT), metadata=metadata, timeout=10)
    assert {200, 400, 401, 404} <= statuses
    lines, metrics = log.getvalue(), generate_latest(registry).decode()
    assert lines.count("\n") > 8 and "shoal_requests_total{" in metrics
    # Of a defect the log says what and where it was, and not what it says itself.
    assert (defect is None) != ("fake_backend.py" in lines and "builtins.ValueError" in lines)
    for secret in (*SECRETS, key, wrong, key[-43:], digest_of(key)):
        assert secret not in lines, next(line for line in lines.splitlines() if secret in line)
        assert secret not in metrics
