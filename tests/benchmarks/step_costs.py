"""What steps cost on this machine: measured, fitted, and written for simulate.py.

    python tests/benchmarks/step_costs.py --json step-costs.json [--skips 0 5 10] [--no-serving]

Four parts: steps of prefill, for each number of skipped layers, by chunk and context; steps of decode by sequences and
context; what two stages that share the cores lose; and, of a real server with one replica of each pool, how much longer
steps take in it, and what a request, a hand-off and a token cost beside them. Each formula is fitted by least squares
of relative errors; how far it is from the times that it was fitted to is printed and kept, and so are the times.
Leave the machine alone meanwhile.
"""

from __future__ import annotations

import os

# As replicas have it, before torch loads (cluster/graph.py).
os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="5000", TOKENIZERS_PARALLELISM="false")

import argparse
from pathlib import Path

import torch
from child import adopt_orphans
from cost_fits import (
    Sample,
    decode_cost,
    handoff_cost,
    prefill_cost,
    server_slowdown,
    serving_cost,
    slowed,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from serving_times import ask
from sharing_times import sharing_efficiency
from simulation.costs import FitQuality, HandoffCost, PrefillCost, ServingCost, SharingCost, StepCosts
from step_costs_table import show
from step_times import Grid, config_for, decode_times, make_engine, prefill_times

from shoal.config import ShoalConfig, load_config
from shoal.engine.build import Served, layout_of, num_blocks_for
from shoal.wire.messages import Stage


class Measuring:
    """Samples and fits by name, and a bar."""

    def __init__(self, options: argparse.Namespace, progress: Progress) -> None:
        self.samples: dict[str, list[Sample]] = {}
        self.fits: dict[str, FitQuality] = {}
        self._options, self._progress = options, progress
        self.grid = Grid(
            tuple(options.chunks), options.prompt_tokens, tuple(options.streams), tuple(options.contexts),
            options.rounds, options.steps,
        )  # fmt: skip

    def prefill(self, skip_layers: int) -> PrefillCost:
        name = f"prefill, {skip_layers} skipped"
        grid = self.grid
        bar = self._progress.add_task(name, total=grid.rounds * len(grid.chunks))
        engine = make_engine(config_for(skip_layers, grid), Stage.PREFILL)
        self.samples[name] = prefill_times(engine, grid, lambda: self._progress.advance(bar))
        cost, self.fits[name] = prefill_cost(skip_layers, self.samples[name])
        return cost

    def costs(self) -> StepCosts:
        options, grid = self._options, self.grid
        prefill = tuple(self.prefill(skip_layers) for skip_layers in options.skips)
        bar = self._progress.add_task("decode", total=len(grid.streams) * len(grid.contexts))
        engine = make_engine(config_for(max(options.skips), grid), Stage.DECODE)
        self.samples["decode"] = decode_times(engine, grid, lambda: self._progress.advance(bar))
        decode, self.fits["decode"] = decode_cost(self.samples["decode"])
        del engine
        bar = self._progress.add_task("sharing", total=1)
        efficiency, rates = sharing_efficiency(max(options.skips), options.threads, options.seconds)
        self.samples["sharing"] = [rates]
        self._progress.advance(bar)
        sharing = SharingCost(cores=options.threads, threads=options.threads, efficiency=efficiency)
        served = Served.of(load_config(model={"dtype": "bfloat16", "skip_layers": 10}))
        costs = StepCosts(
            format=1, machine=_machine(), model=served.name, num_layers=served.spec.num_layers,
            prefill=prefill, decode=decode, sharing=sharing,
            handoff=HandoffCost(latency_s=0.0, bytes_per_s=1e9, token_bytes=token_bytes(served)),
            serving=ServingCost(request_s=0.0, step_s=0.0, token_s=0.0),
            prefill_pool_tokens=_pool_tokens(served, Stage.PREFILL),
            decode_pool_tokens=_pool_tokens(served, Stage.DECODE),
        )  # fmt: skip
        if not options.no_serving:
            costs = self._with_serving(costs)
        return costs.model_copy(update={"fits": self.fits, "samples": self.samples})

    def _with_serving(self, costs: StepCosts) -> StepCosts:
        options = self._options
        total = options.samples * (len(options.prompts) + len(options.serving_streams))
        bar = self._progress.add_task("serving", total=total)
        skip_layers = max(options.skips)
        asked = ask(
            skip_layers, options.prompts, options.serving_streams, options.samples,
            lambda: self._progress.advance(bar),
        )  # fmt: skip
        self.samples["alone"], self.samples["together"] = asked.alone, asked.together
        chunk = ShoalConfig().prefill.max_step_tokens
        alone = costs.of_skip(skip_layers)
        slower, way_s, self.fits["prefill in a server"] = server_slowdown(alone, asked.alone, chunk)
        handoff, self.fits["hand-off"] = handoff_cost(asked.alone, way_s, costs.handoff.token_bytes, chunk)
        assert costs.sharing is not None
        prefill = tuple(slowed(one, slower) for one in costs.prefill)
        serving, slower, self.fits["serving"] = serving_cost(asked.alone, asked.together, costs.decode, costs.sharing)
        decode = slowed(costs.decode, slower)
        return costs.model_copy(update={"prefill": prefill, "decode": decode, "handoff": handoff, "serving": serving})


def token_bytes(served: Served) -> int:
    """K/V of one token in all layers, as it is shipped."""
    return layout_of(served, Stage.DECODE, block_tokens=1).token_bytes


def _pool_tokens(served: Served, stage: Stage) -> int:
    """What a replica would take by default, of the memory that is free now."""
    config = ShoalConfig()
    limits = config.prefill if stage is Stage.PREFILL else config.decode
    layout = layout_of(served, stage, limits.block_tokens)
    return num_blocks_for(limits, layout, served, torch.device("cpu"), 1.0) * limits.block_tokens


def _machine() -> str:
    """As the processor names itself, and its cores."""
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU")
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the costs here")
    parser.add_argument("--skips", type=int, nargs="+", default=[0, 5, 10], help="numbers of skipped layers")
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 256, 1024, 2048], help="tokens of a step")
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="the longest context of prefill")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="decode steps in a row")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run of the stages that share cores")
    parser.add_argument("--no-serving", action="store_true", help="without a server: requests and tokens cost nothing")
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 512, 1000, 1800], help="asked of it alone")
    parser.add_argument("--serving-streams", type=int, nargs="+", default=[1, 4, 8, 16], help="asked of it together")
    parser.add_argument("--samples", type=int, default=5, help="of each")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def main() -> None:
    options = _options()
    least = ShoalConfig().handoff.min_tokens
    if not options.no_serving and len({num for num in options.prompts if num >= least}) < 2:
        raise SystemExit(f"error: --prompts needs two lengths of {least} tokens or more, which are handed over")
    adopt_orphans()
    torch.set_num_threads(options.threads)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        costs = Measuring(options, progress).costs()
    show(costs)
    if options.json:
        Path(options.json).write_text(costs.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
