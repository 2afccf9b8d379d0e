"""How long a prompt takes a CPU with a model that isn't here: random weights in its shape, both depths.

    python tests/benchmarks/larger_model.py [--shape llama-3.2-1b] [--rounds 3] [--json FILE]
    python tests/benchmarks/larger_model.py --shape tiny --rounds 1        # seconds, to see that all of it runs

Times are from a prompt's ids to its first token, on all cores, nothing cached, by Shoal's kernels and by torch's in the
same engine, in turns. Full depth's FLOPs over its time stand beside the rate of one large product in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from gpu import prefill_s, product_flops_per_s
from random_model import SHAPES, make_engine
from ratios import median_ratio
from rich.console import Console
from rich.progress import track
from rich.table import Table
from work import prefill_flops

from shoal.model.plan import LayerPlan
from shoal.wire.messages import Depth

CPU = torch.device("cpu")
WHOSE = {"Shoal's": "auto", "torch's": "torch"}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = SHAPES[options.shape]
    engines = {
        whose: make_engine(shape, torch.bfloat16, CPU, max(shape.prompt_tokens), kernels)
        for whose, kernels in track(WHOSE.items(), description="random weights")
    }
    rows, products = [], []
    for num_tokens in shape.prompt_tokens:
        prompt = tuple(torch.randint(2, shape.config["vocab_size"], (num_tokens,)).tolist())
        seconds: dict[tuple[str, Depth], list[float]] = {
            (whose, depth): [] for whose in WHOSE for depth in (Depth.SHALLOW, Depth.FULL)
        }
        for number in track(range(options.rounds + 1), description=f"{num_tokens:,} tokens"):
            for (whose, depth), found in list(seconds.items())[:: -1 if number % 2 else 1]:
                took_s = prefill_s(engines[whose], [prompt], depth)
                if number:  # the first one warms up
                    found.append(took_s)
            products.append(product_flops_per_s(shape.product_size, torch.bfloat16, CPU))
        rows += [row_of(engines[whose].runner.decoder, num_tokens, whose, seconds) for whose in WHOSE]
    peak = statistics.median(products)
    for row in rows:
        row["share_of_products"] = row.pop("full_flops") / row["median_s"]["full"] / peak
    result = {
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "torch": torch.__version__,
        "skip_layers": shape.skip_layers,
        "layers": shape.config["num_hidden_layers"],
        "product_flops_per_s": peak,
        "prefill": rows,
    }
    show(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def row_of(decoder: Any, num_tokens: int, whose: str, seconds: dict[tuple[str, Depth], list[float]]) -> dict[str, Any]:
    taken = {str(depth): found for (name, depth), found in seconds.items() if name == whose}
    median = {depth: statistics.median(found) for depth, found in taken.items()}
    full = prefill_flops(decoder.spec, LayerPlan(decoder.spec.num_layers, 0), num_tokens)
    return {
        "tokens": num_tokens,
        "kernels": whose,
        "seconds": taken,
        "median_s": median,
        "full_over_shallow": median_ratio(taken["full"], taken["shallow"]),
        "ideal": full / prefill_flops(decoder.spec, decoder.plan, num_tokens),
        "full_flops": full,
    }


def show(result: dict[str, Any]) -> None:
    skipped = f"{result['skip_layers']} of {result['layers']} layers skipped"
    table = Table(title=f"{result['settings']['shape']}, random weights, {skipped}")
    for column in ("tokens", "kernels", "full, s", "of products", "shallow, s", "ratio", "by FLOPs"):
        table.add_column(column, justify="left" if column == "kernels" else "right")
    for row in result["prefill"]:
        full, shallow = (f"{row['median_s'][depth]:.3f}" for depth in ("full", "shallow"))
        ratios = (f"{row[name]:.2f}" for name in ("full_over_shallow", "ideal"))
        table.add_row(f"{row['tokens']:,}", row["kernels"], full, f"{row['share_of_products']:.2f}", shallow, *ratios)
    Console().print(table)
    Console().print(f"products run at {result['product_flops_per_s'] / 1e9:.0f} GFLOP/s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", help="write the raw figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
