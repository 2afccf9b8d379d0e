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

import httpx
from child import serving
from cost_fits import Sample
from load import LoadOptions, Loads, send_at_once
from prometheus_client.parser import text_string_to_metric_families

from shoal.cluster.ports import free_port

_STAGES = "shoal_ttft_stage_seconds_sum"
_SHORT_PROMPT, _STREAM_OUTPUT = 16, 64
_PAUSE_S = 3.0
"""Before each prompt alone. A machine that had nothing to do takes longer than one that had, and such are most whose
prompts come one at a time."""


@dataclass(frozen=True, slots=True)
class Asked:
    """``alone``: one request each, its TTFT and the stages that the server tells. ``together``: TPOT by streams."""

    alone: list[Sample]
    together: list[Sample]


def ask(
    skip_layers: int, prompts: Sequence[int], streams: Sequence[int], samples: int, on_step: Callable[[], None]
) -> Asked:
    """Starts and ends a server of its own."""
    with server(skip_layers) as url:
        return asyncio.run(_ask_all(url, prompts, streams, samples, on_step))


@contextmanager
def server(skip_layers: int, *arguments: str) -> Iterator[str]:
    """Serves SmolLM2 by one replica of each pool for the block, with further ``arguments``; yields the URL."""
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-c", "from shoal.cli.command import main; main()", "serve", "--dtype", "bfloat16",
        "--skip-layers", str(skip_layers), "--prefill-replicas", "1", "--decode-replicas", "1",
        "--port", str(port), "--grpc-port", "0", *arguments,
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
        alone += await ask_alone(url, num_tokens, samples, on_step, num_output=_STREAM_OUTPUT, pause_s=_PAUSE_S)
        together += [
            {"streams": 1, "context": num_tokens + _STREAM_OUTPUT // 2, "tpot_s": one["tpot_s"]}
            for one in alone[-samples:]
            if one["tpot_s"] is not None
        ]
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
    url: str,
    num_tokens: int,
    samples: int,
    on_step: Callable[[], None] = lambda: None,
    *,
    num_output: int = 2,
    pause_s: float = 0.0,
) -> list[Sample]:
    """Prompts of so many tokens, one at a time: TTFT and TPOT of each, and the stages that the server tells of it."""
    loads = Loads(range(1000, 9000), LoadOptions(prompt_tokens=num_tokens, output_tokens=num_output), seed=num_tokens)
    await send_at_once(url, [loads.alone("warm-up")])
    found = []
    for sample in range(samples):
        await asyncio.sleep(pause_s)
        before = _stages(url)
        [record] = await send_at_once(url, [loads.alone(f"sample {sample}")])
        told = {name: seconds - before[name] for name, seconds in _stages(url).items()}
        found.append({"prompt_tokens": num_tokens, "ttft_s": record.ttft_s, "tpot_s": record.tpot_s, **told})
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
