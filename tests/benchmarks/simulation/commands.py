"""simulate.py, from what was typed to what is printed."""

from __future__ import annotations

import re
from pathlib import Path

from simulation.costs import StepCosts, read_costs
from simulation.plan import PlanOptions, Progress, make_plan, ratios
from simulation.plan_page import render_plan, summarize_plan
from simulation.routing import Routing
from simulation.system import Fleet

from shoal.config import load_config
from shoal.errors import ConfigError
from shoal_lab.bench.generator import DEFAULT_DURATION_S, Amount
from shoal_lab.bench.load import Load, parse_rates
from shoal_lab.bench.mix import Slo, parse_mix
from shoal_lab.report.folder import output_folder

SWEEP = "sweep"
_RESULT, _REPORT = "simulation.json", "report.html"


def run_simulate(
    costs: Path,
    on_progress: Progress,
    *,
    config: Path | None,
    replicas: int | None,
    ratio: str | None,
    skip_layers: str | None,
    rate: str,
    num_requests: int | None,
    duration_s: float | None,
    warm_up: int,
    mix: str,
    slo_ttft_ms: float,
    slo_tpot_ms: float,
    routing: str,
    shared: bool,
    seed: int,
    output: Path,
) -> str:
    """Write simulation.json and report.html to ``output``; what to tell the user. Raises ShoalError."""
    if num_requests is not None and duration_s is not None:
        raise ConfigError("--num-requests and --duration-s both say how much is sent: leave one of them out")
    known = read_costs(costs)
    options = PlanOptions(
        costs=known,
        config=load_config(config),
        fleets=parse_fleets(known, replicas, ratio, skip_layers, Routing(routing), is_shared=shared),
        mix=parse_mix(mix, Slo(slo_ttft_ms, slo_tpot_ms)),
        loads=parse_load(rate),
        amount=Amount(warm_up, num_requests, DEFAULT_DURATION_S if duration_s is None else duration_s),
        seed=seed,
    )
    with output_folder(output, (_RESULT, _REPORT)):
        plan = make_plan(options, on_progress)
        (output / _RESULT).write_text(plan.to_json(), encoding="utf-8")
        (output / _REPORT).write_text(render_plan(plan, known), encoding="utf-8")
    on_progress("", 0, 0)
    return "\n".join([*summarize_plan(plan), f"report: {output / _REPORT}"])


def parse_load(text: str) -> tuple[Load, ...]:
    """None of them for ``sweep``. Raises ConfigError."""
    return () if text == SWEEP else parse_rates(text, "2,4,8, or sweep")


def parse_fleets(
    costs: StepCosts, replicas: int | None, ratio: str | None, skip_layers: str | None, routing: Routing, *,
    is_shared: bool,
) -> tuple[Fleet, ...]:  # fmt: skip
    """Every ratio with every skip count. Raises ConfigError."""
    if (replicas is None) == (ratio is None):
        raise ConfigError(
            "say how many replicas there are: --replicas tries all ratios of them, --ratio those it names"
        )
    pools = ratios(replicas) if replicas is not None else [_parse_ratio(part) for part in (ratio or "").split(",")]
    skips = costs.skips if skip_layers is None else _parse_skips(skip_layers)
    return tuple(
        Fleet(num_prefill, num_decode, skip, is_shared, routing) for skip in skips for num_prefill, num_decode in pools
    )


def _parse_skips(text: str) -> list[int]:
    """``1,2``: ascending, each once. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,6}", part) for part in parts):
        raise ConfigError(f"--skip-layers is {text!r}: write whole numbers with commas between them")
    return sorted({int(part) for part in parts})


def _parse_ratio(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d{1,4}):(\d{1,4})\s*", text)
    if not found or not int(found[2]):
        raise ConfigError(f"--ratio has {text!r}: write prefill:decode, like 1:3,2:2; 0:1 is decode alone")
    return int(found[1]), int(found[2])
