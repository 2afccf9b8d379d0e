"""A gateway with both doors before the two stages of one process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from inference_server import client_of
from prometheus_client import CollectorRegistry

from shoal.api.backend import Readiness
from shoal.api.http_app import create_app
from shoal.api.intake import Services
from shoal.api.tokenizer import Tokenizer
from shoal.api.validation import ServedModel
from shoal.client import AsyncClient
from shoal.cluster.local import LocalShoal, open_local
from shoal.config import GatewayConfig, load_config
from shoal.telemetry import GatewayMetrics
from shoal.wire.messages import GenerateRequest, HandoffReport, TokenOutput
from shoal.wire.requests import from_submit, to_submit

GATEWAY_ID, SERVER_ID = b"g" * 16, b"s" * 16


class Pools:
    """The two stages as the gateway sees them; each request takes its wire format."""

    def __init__(self, local: LocalShoal) -> None:
        self._local = local
        self.reports: list[HandoffReport] = []

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenOutput]:
        arrived = from_submit(to_submit(GATEWAY_ID, 7, SERVER_ID, request))
        async for output in self._local.decode.worker.generate(arrived):
            if output.handoff is not None:
                self.reports.append(output.handoff)
            yield output

    async def readiness(self) -> Readiness:
        return Readiness(1, 1)


@dataclass(frozen=True)
class Served:
    http: httpx.AsyncClient
    grpc: AsyncClient
    pools: Pools
    registry: CollectorRegistry
    tokenizer: Tokenizer

    async def post(self, path: str = "/v1/completions", **fields: Any) -> Any:
        response = await self.http.post(path, json={"model": "tiny", "temperature": 0, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def num_counted(self, reason: str) -> float | None:
        return self.registry.get_sample_value("shoal_full_depth_requests_total", {"reason": reason})


@asynccontextmanager
async def serving(folder: Path, **model: Any) -> AsyncIterator[Served]:
    """The tiny model in ``folder``; ``model`` are settings of it. All blocks must be free in the end."""
    stage = {"num_blocks": 128, "block_tokens": 4, "max_step_tokens": 7, "num_threads": 1}
    settings = {"name": str(folder), "skip_layers": 3, "dtype": "float64"} | model
    config = load_config(model=settings, prefill=stage, decode=stage)
    registry = CollectorRegistry()
    async with open_local(config) as local:
        tokenizer = Tokenizer(local.decode.served.files.tokenizer())
        served = ServedModel("tiny", 512, tokenizer.vocab_size)
        pools = Pools(local)
        services = Services(
            pools,  # type: ignore[arg-type]
            tokenizer,
            (served,),
            GatewayConfig(),
            GatewayMetrics(registry, ["tiny"]),
            wants_outline=config.model.plan == "speed",
        )
        transport = httpx.ASGITransport(create_app(services))
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://shoal", timeout=30) as http,
            client_of(services) as inference,
            AsyncClient(inference.address, timeout_s=30) as grpc,
        ):
            yield Served(http, grpc, pools, registry, tokenizer)
        counts = await local.decode.counts()
        assert counts.num_free_blocks == counts.num_blocks
        tokenizer.close()
