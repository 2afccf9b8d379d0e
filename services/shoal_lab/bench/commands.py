"""``shoal bench``, from what was typed to what is printed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal.errors import ConfigError
from shoal_lab.bench.benchmark import Benchmark, BenchOptions, Progress, measure
from shoal_lab.bench.benchmark_page import render_benchmark, summarize_benchmark
from shoal_lab.bench.clock import RealClock
from shoal_lab.bench.endpoint import EndpointOptions, open_endpoint
from shoal_lab.bench.generator import DEFAULT_DURATION_S, Amount
from shoal_lab.bench.level import Level
from shoal_lab.bench.load import Load, parse_concurrency, parse_rates
from shoal_lab.bench.mix import Slo, parse_mix
from shoal_lab.bench.workload import PromptKind
from shoal_lab.report.folder import output_folder

SWEEP = "sweep"
SWEEP_FROM = 1.0
_RESULT, _REPORT = "bench.json", "report.html"


def run_bench(
    url: str,
    on_progress: Progress,
    on_measured: Callable[[Load], None],
    *,
    output: Path,
    rate: str | None,
    concurrency: str | None,
    num_requests: int | None,
    duration_s: float | None,
    warm_up: int,
    mix: str,
    slo_ttft_ms: float,
    slo_tpot_ms: float,
    prompts: str,
    token_ids: str,
    extra_body: str | None,
    api_key_env: str | None,
    seed: int,
    **endpoint: Any,
) -> tuple[str, bool]:
    """Write bench.json and report.html to ``output``; what to tell the user, and whether any request was answered.

    ``on_measured`` is told each load that they have.

    ``endpoint``: more EndpointOptions. Raises ShoalError.
    """
    if num_requests is not None and duration_s is not None:
        raise ConfigError("--num-requests and --duration-s both say how much is sent: leave one of them out")
    loads, sweep_from = parse_loads(rate, concurrency)
    options = BenchOptions(
        endpoint=EndpointOptions(
            url,
            prompts=PromptKind(prompts),
            extra_body=parse_body(extra_body),
            api_key=parse_key(api_key_env, os.environ),
            **endpoint,
        ),
        mix=parse_mix(mix, Slo(slo_ttft_ms, slo_tpot_ms)),
        loads=loads,
        sweep_from=sweep_from,
        amount=Amount(warm_up, num_requests, DEFAULT_DURATION_S if duration_s is None else duration_s),
        token_ids=parse_token_ids(token_ids),
        seed=seed,
    )
    _allow_connections()
    with output_folder(output, (_RESULT, _REPORT)):
        found = asyncio.run(_measure(options, output, on_progress, on_measured))
    on_progress("", 0, 0)
    return "\n".join([*summarize_benchmark(found), f"report: {output / _REPORT}"]), found.is_answered


async def _measure(
    options: BenchOptions, output: Path, on_progress: Progress, on_measured: Callable[[Load], None]
) -> Benchmark:
    """The files are written anew after each load, so that a run that is stopped leaves what it has."""
    clock = RealClock()
    async with open_endpoint(options.endpoint, clock) as endpoint:
        found = Benchmark(options.settings(endpoint.model))

        def on_level(level: Level) -> None:
            nonlocal found
            found = found.with_level(level)
            (output / _RESULT).write_text(found.to_json(), encoding="utf-8")
            (output / _REPORT).write_text(render_benchmark(found), encoding="utf-8")
            on_measured(level.load)

        await measure(endpoint, options, clock, on_progress, on_level)
        return found


def _allow_connections() -> None:
    """As many open files as the system lets this process have: each request that is under way has a connection."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # where it lets nobody change that, what it gives must do
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def parse_loads(rate: str | None, concurrency: str | None) -> tuple[tuple[Load, ...], float | None]:
    """The loads, and where to begin to sweep. One request a second if nothing is said. Raises ConfigError."""
    if rate is not None and concurrency is not None:
        raise ConfigError("--rate is an open loop and --concurrency a closed one: choose one of them")
    if concurrency is not None:
        return parse_concurrency(concurrency), None
    if rate is None:
        return (Load(rate=1.0),), None
    word, colon, start = rate.partition(":")
    if word != SWEEP:
        return parse_rates(rate), None
    if not colon:
        return (), SWEEP_FROM
    starts = parse_rates(start)
    if len(starts) > 1:
        raise ConfigError(f"--rate is {rate!r}: a sweep begins at one rate, like sweep:0.25")
    return (), starts[0].value


def parse_token_ids(text: str) -> tuple[int, int]:
    """``1000-30000``. Raises ConfigError."""
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text)
    if not found or int(found[1]) > int(found[2]):
        raise ConfigError(f"--token-ids is {text!r}: write the lowest and the highest id, like 1000-30000")
    return int(found[1]), int(found[2])


def parse_body(text: str | None) -> dict[str, Any]:
    """A JSON object. Raises ConfigError."""
    try:
        document = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--extra-body isn't JSON ({error}): write an object like '{{\"top_k\": 1}}'") from None
    if not isinstance(document, dict):
        raise ConfigError(f"--extra-body is {text}: write a JSON object like '{{\"top_k\": 1}}'")
    return document


def parse_key(name: str | None, environment: Mapping[str, str]) -> str | None:
    """The variable's value without blanks around it; the command line itself is no place for a key. Raises ConfigError,
    which doesn't tell the key."""
    if name is None:
        return None
    key = environment.get(name, "").strip()
    if not key:
        raise ConfigError(f"--api-key-env names {name}, which isn't set: export it first")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"--api-key-env names {name}, and a key has letters, digits and signs of ASCII alone: look for what else "
            "came with it, such as a line break or a quotation mark, and export it again"
        )
    return key
