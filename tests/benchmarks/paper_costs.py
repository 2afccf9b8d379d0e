"""Step costs by arithmetic, for a machine that isn't here: what its data sheet promises, times assumed efficiencies.

    python tests/benchmarks/paper_costs.py --json costs-h100.json [--chip h100] [--model llama-3.1-8b] [--skips 0 5 10]

This is no measurement of anything. Shoal has one replica a chip (no tensor parallelism), so the model must fit one.
Each assumption is an option, is kept in the file, and is printed in the report of simulate.py.

Rates are those of NVIDIA's data sheets: dense bfloat16 products without sparsity, HBM, and one 400 Gbit/s port a GPU as
in a DGX H100 or H200. Sizes of models are their published configurations.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from simulation.paper import Assumptions, Chip, Shape, paper_costs
from step_costs_table import show

CHIPS = {
    "h100": Chip("NVIDIA H100 SXM", 989.4e12, 80e9, 3.35e12, 50e9),
    "h200": Chip("NVIDIA H200 SXM", 989.4e12, 141e9, 4.8e12, 50e9),
}
MODELS = {
    "llama-3.1-8b": Shape("Llama-3.1-8B", 32, 4096, 14_336, 4096, 1024, 128_256),
    "mistral-7b": Shape("Mistral-7B", 32, 4096, 14_336, 4096, 1024, 32_768),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=sorted(CHIPS), default="h100")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3.1-8b")
    parser.add_argument("--skips", type=int, nargs="+", default=[0, 5, 10], help="numbers of skipped layers")
    parser.add_argument("--json", help="write the costs here, for simulate.py")
    for one in fields(Assumptions):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=float, default=one.default, metavar="X")
    options = parser.parse_args()
    assumed = Assumptions(**{one.name: getattr(options, one.name) for one in fields(Assumptions)})
    costs = paper_costs(CHIPS[options.chip], MODELS[options.model], options.skips, assumed)
    show(costs)
    console = Console()
    console.print(
        f"K/V of a token {costs.handoff.token_bytes:,} bytes; a pool holds {costs.decode_pool_tokens:,} tokens"
    )
    for name, value in costs.assumptions.items():
        console.print(f"assumed: {name} {value:g}" if isinstance(value, float) else f"assumed: {name} {value}")
    if options.json:
        Path(options.json).write_text(costs.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
