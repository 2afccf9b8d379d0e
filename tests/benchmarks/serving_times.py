"""What a request and a token cost beside the engines' steps: asked of a real server, one replica of each pool."""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from child import free_port, serving
from load import LoadOptions, Loads, send_at_once
from prometheus_client.parser import text_string_to_metric_families

from shoal.simulate.costs import DecodeCost, FitQuality, HandoffCost, ServingCost, SharingCost
from shoal.simulate.fit import fit

Sample = dict[str, Any]
_STAGES = "shoal_ttft_stage_seconds_sum"
_SHORT_PROMPT, _STREAM_OUTPUT = 16, 64


@dataclass(frozen=True, slots=True)
class Asked:
    """``alone``: one request each, its TTFT and the stages that the server tells. ``together``: TPOT by streams."""

    alone: list[Sample]
    together: list[Sample]


def ask(
    skip_layers: int, prompts: Sequence[int], streams: Sequence[int], samples: int, on_step: Callable[[], None]
) -> Asked:
    """Starts and ends a server of its own."""
    with server(skip_layers, 1) as url:
        return asyncio.run(_ask_all(url, prompts, streams, samples, on_step))


@contextmanager
def server(skip_layers: int, replicas: int) -> Iterator[str]:
    """Serves SmolLM2 by so many replicas of each pool for the block; yields the URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-c", "from shoal.command import main; main()", "serve", "--dtype", "bfloat16",
        "--skip-layers", str(skip_layers), "--prefill-replicas", str(replicas), "--decode-replicas", str(replicas),
        "--port", str(port), "--grpc-port", "0",
    ]  # fmt: skip
    with (
        tempfile.TemporaryDirectory(prefix="shoal-simulation-") as folder,
        serving(command, {}, Path(folder) / "log", url, "/readyz", 400),
    ):
        yield url


async def _ask_all(
    url: str, prompts: Sequence[int], streams: Sequence[int], samples: int, on_step: Callable[[], None]
) -> Asked:
    alone, together = [], []
    for num_tokens in prompts:
        alone += await ask_alone(url, num_tokens, samples, on_step)
    load = LoadOptions(stream_prompt_tokens=_SHORT_PROMPT, stream_output_tokens=_STREAM_OUTPUT)
    loads = Loads(range(1000, 9000), load, seed=1)
    for num in streams:
        for sample in range(samples):
            records = await send_at_once(url, loads.together(f"sample {sample}", num))
            tpot_s = statistics.median(record.tpot_s for record in records if record.tpot_s is not None)
            together.append({"streams": num, "context": _SHORT_PROMPT + _STREAM_OUTPUT // 2, "tpot_s": tpot_s})
            on_step()
    return Asked(alone, together)


async def ask_alone(
    url: str, num_tokens: int, samples: int, on_step: Callable[[], None] = lambda: None
) -> list[Sample]:
    """Prompts of so many tokens, one at a time: the TTFT of each, and the stages that the server tells of it."""
    loads = Loads(range(1000, 9000), LoadOptions(prompt_tokens=num_tokens, output_tokens=2), seed=num_tokens)
    await send_at_once(url, [loads.alone("warm-up")])
    found = []
    for sample in range(samples):
        before = _stages(url)
        [record] = await send_at_once(url, [loads.alone(f"sample {sample}")])
        told = {name: seconds - before[name] for name, seconds in _stages(url).items()}
        found.append({"prompt_tokens": num_tokens, "ttft_s": record.ttft_s, **told})
        on_step()
    return found


def _stages(url: str) -> dict[str, float]:
    """Seconds in each stage of all requests so far, as the gateway counts them."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=10, trust_env=False).text)
    return {
        f"{sample.labels['stage']}_s": sample.value
        for family in families
        for sample in family.samples
        if sample.name == _STAGES
    }


# --- from times to costs ----------------------------------------------------------------------------------


def fit_handoff(samples: Sequence[Sample], token_bytes: int, chunk: int) -> tuple[HandoffCost, FitQuality]:
    """What the way to prefill and back takes beside computing: a latency, and the last chunk's bytes."""
    samples = [one for one in samples if one["transfer_exposed_s"] > 0]  # short prompts stay with decode
    tails = [token_bytes * ((one["prompt_tokens"] - 2) % chunk + 1) for one in samples]
    times = [one["queue_s"] + one["transfer_exposed_s"] for one in samples]
    (latency_s, byte_s), quality = fit([(1.0, tail) for tail in tails], times)
    return HandoffCost(latency_s=latency_s, bytes_per_s=1 / max(byte_s, 1e-12), token_bytes=token_bytes), quality


def fit_serving(
    asked: Asked, decode: DecodeCost, sharing: SharingCost
) -> tuple[ServingCost, FitQuality]:  # fmt: skip
    """What a step's way to its clients works, from how much longer it makes the steps beside it.

    That work has one thread and a step ``sharing.threads``. While both run, either advances at the speed that the
    simulation gives them, v; so work w makes a step w (1 / v - 1) longer.
    """
    num_threads = sharing.threads + 1
    speed = 1.0 if num_threads <= sharing.cores else sharing.efficiency * sharing.cores / num_threads
    longer = 1 / speed - 1 if speed < 1 else 1.0
    steps_s = [decode.seconds(one["streams"], one["streams"] * one["context"]) for one in asked.together]
    (step_s, token_s), quality = fit(
        [(longer, longer * one["streams"]) for one in asked.together],
        [one["tpot_s"] for one in asked.together],
        steps_s,
    )
    engines = ("queue_s", "prefill_s", "transfer_exposed_s", "boundary_step_s")
    rest = statistics.median(one["ttft_s"] - sum(one[name] for name in engines) for one in asked.alone)
    return ServingCost(request_s=max(0.0, rest - step_s - token_s), step_s=step_s, token_s=token_s), quality
