"""The decode pool's Ray Serve deployment: one process, one replica."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from shoal import directory
from shoal.config import ShoalConfig
from shoal.decode.stage import open_decode
from shoal.errors import PeerGone, ShoalError, Unavailable
from shoal.messages import GenerateRequest, Grant, HandoffOutcome, TokenOutput
from shoal.telemetry import bind_request, configure_logging, new_registry, serve_metrics


class DecodeReplica:
    """Called by the gateway through its Serve handle; calls prefill replicas through ``prefill``."""

    async def __init__(self, config: dict[str, Any], prefill: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        settings = ShoalConfig(**config)
        configure_logging(settings.log.level, settings.log.format)
        self._prefill: Any = prefill
        self._exits = AsyncExitStack()
        registry = new_registry()
        ports = settings.metrics.port_range
        metrics = serve_metrics(registry, settings.metrics.host, ports.first, ports.last)
        self._exits.callback(metrics.close)
        self._stage = await self._exits.enter_async_context(
            open_decode(
                settings,
                registry,
                self._ask_prefill,
                has_prefill=LivingPool(settings.ray.app_name, "prefill").is_there,
                on_progress=_report_loading,
            )
        )
        handoff = settings.handoff
        address = await self._stage.server.listen(
            handoff.host,
            handoff.port_range.first,
            handoff.port_range.last,
            advertised_host=handoff.advertised_host,
        )
        self._entry = directory.entry_of_this_replica(
            "decode", metrics_address=f"{settings.metrics.host}:{metrics.port}", handoff_address=address
        )
        await asyncio.to_thread(directory.register, self._entry)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        """Continue one prompt; ending the iteration frees everything on both pools."""
        with bind_request(request.context.request_id):
            async with aclosing(self._stage.worker.generate(request)) as outputs:
                async for output in outputs:
                    yield output

    async def describe(self) -> dict[str, Any]:
        """What this live replica holds: for operators, the demo and the tests."""
        stage = self._stage
        return {
            "pid": os.getpid(),
            "num_layers": stage.served.plan.num_layers,
            "layers": [0, stage.served.plan.num_layers],
            "parameter_bytes": stage.parameter_bytes,
            "plan_hash": stage.served.plan_hash,
            "prefill": await self._prefill.describe.remote(),
        }

    async def check_health(self) -> None:
        if not self._stage.engine.is_healthy:
            raise Unavailable("the engine has stopped, or all of its last steps failed")

    async def __del__(self) -> None:
        if hasattr(self, "_entry"):
            await asyncio.to_thread(directory.unregister, self._entry)
        await self._exits.aclose()

    async def _ask_prefill(self, grant: Grant) -> HandoffOutcome:
        call = self._prefill.prefill.remote(grant)
        try:
            outcome: HandoffOutcome = await call
        except asyncio.CancelledError:
            call.cancel()
            raise
        except (RayError, RayServeException) as error:
            raise known_error(error) from error
        return outcome


class LivingPool:
    """Whether any replica of a pool lives. A yes is believed for ``BELIEVED_S``, and asked for again beside it."""

    BELIEVED_S = 1.0

    def __init__(self, app_name: str, role: directory.Role) -> None:
        self._app_name = app_name
        self._role = role
        self._seen_s = -math.inf
        self._asking: asyncio.Task[bool] | None = None

    async def is_there(self) -> bool:
        now_s = time.monotonic()
        if now_s - self._seen_s < self.BELIEVED_S:
            return True
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        # A pool that was just there most likely still is: nobody waits for the answer.
        return True if now_s - self._seen_s < 2 * self.BELIEVED_S else await asyncio.shield(self._asking)

    async def _ask(self) -> bool:
        there = bool(await asyncio.to_thread(directory.living, self._app_name, self._role))
        self._seen_s = time.monotonic() if there else -math.inf
        return there


def known_error(error: Exception) -> ShoalError:
    """The error that a replica raised, as it was; anything of Ray's own means that the replica went away."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, ShoalError) else PeerGone(f"the replica went away: {type(error).__name__}")


def _report_loading(num_done: int, num_total: int) -> None:
    directory.report_loading("decode", num_done, num_total)
