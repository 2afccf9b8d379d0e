"""What the processor's matrix unit (AMX) brings to Shoal's kernels: each with it and without, in turns, in one run.

    python tests/benchmarks/tiles.py [--rounds 9] [--json FILE]

Prompts' attention is of one layer of SmolLM2-135M; products are of all its layers' matrices, with as many rows as a
prompt has tokens, gates included; and those of a decode step of so many streams, with the lm_head. torch's attention
and products, which use the unit, are measured beside. Numbers are random; times are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from shoal.backends.cpu.kernels import NativeKernels, load
from shoal.model.packed import PackedMatrix

Work = Callable[[], object]
NUM_LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64
GATED = 3072
LAYER, HEAD = ((960, 576), (576, 576), (GATED, 576), (576, 1536)), (49152, 576)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    kernels = load()
    if not kernels.use_tiles():
        raise SystemExit("this processor has no matrix unit (AMX), or the system doesn't let processes use it")
    with torch.inference_mode():
        rows = [_row(kernels, *one, options.rounds) for one in track(list(_works(kernels, options)))]
    _show(rows)
    if options.json:
        result = {"settings": {"rounds": options.rounds, "threads": options.threads}, "rows": rows}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def _works(kernels: NativeKernels, options: Any) -> Iterator[tuple[str, Work, Work | None]]:
    for tokens in options.tokens:
        yield f"attention, {tokens:,} tokens", *_attention(kernels, tokens)
    plain = [torch.randn(shape).bfloat16() for shape in LAYER * NUM_LAYERS]
    layers = [PackedMatrix.of(weight) for weight in plain]
    for tokens in options.tokens:
        inputs = {size: torch.randn(tokens, size).bfloat16() for _, size in LAYER}
        by_torch = partial(_multiply_by_torch, inputs, plain)
        yield f"products, {tokens:,} tokens", partial(_multiply_layers, kernels, inputs, layers), by_torch
    shapes = (*LAYER * NUM_LAYERS, HEAD)
    matrices = [PackedMatrix.of(torch.randn(shape).bfloat16()) for shape in shapes]
    for num_rows in options.streams:
        inputs = {size: torch.randn(num_rows, size).bfloat16() for _, size in LAYER}
        yield f"a step's products, {num_rows} rows", partial(_multiply, kernels, inputs, matrices), None


def _multiply_layers(kernels: NativeKernels, inputs: dict[int, torch.Tensor], matrices: list[PackedMatrix]) -> None:
    for matrix in matrices:
        outputs, size = matrix.shape
        if outputs == GATED:
            kernels.gated_linear(inputs[size], matrix.values, outputs // 2, None, is_gelu=False)
        else:
            kernels.linear(inputs[size], matrix.values, outputs, None)


def _multiply_by_torch(inputs: dict[int, torch.Tensor], matrices: list[torch.Tensor]) -> None:
    for matrix in matrices:
        outputs, size = matrix.shape
        made = F.linear(inputs[size], matrix)
        if outputs == GATED:
            F.silu(made[:, : outputs // 2]).mul_(made[:, outputs // 2 :])


def _multiply(kernels: NativeKernels, inputs: dict[int, torch.Tensor], matrices: list[PackedMatrix]) -> None:
    for matrix in matrices:
        kernels.linear(inputs[matrix.shape[1]], matrix.values, matrix.num_outputs, None)


def _attention(kernels: NativeKernels, tokens: int) -> tuple[Work, Work]:
    queries = torch.randn(tokens, HEADS, HEAD_DIM).bfloat16()
    pool = torch.randn(tokens, 2, KV_HEADS, HEAD_DIM).bfloat16()
    out, scale = torch.empty_like(queries), HEAD_DIM**-0.5
    own, keys, values = (each.transpose(0, 1)[None] for each in (queries, pool[:, 0], pool[:, 1]))
    return (
        lambda: kernels.attend_prompt(queries, pool, slice(0, tokens), tokens, None, scale, out),
        lambda: F.scaled_dot_product_attention(own, keys, values, is_causal=True, enable_gqa=True),
    )


def _row(kernels: NativeKernels, name: str, work: Work, other: Work | None, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"with": [], "without": [], **({"torch": []} if other else {})}
    for _ in range(rounds + 1):
        for way, times in seconds.items():
            kernels.use_tiles(way == "with")
            run = other if way == "torch" and other else work
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    kernels.use_tiles()
    return {"what": name, "seconds": {way: times[1:] for way, times in seconds.items()}}  # the first warms up


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="milliseconds, medians")
    for column in ("what", "without", "with tiles", "", "torch"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        median = {way: statistics.median(times) * 1e3 for way, times in row["seconds"].items()}
        table.add_row(
            row["what"], f"{median['without']:.1f}", f"{median['with']:.1f}",
            f"{median['without'] / median['with']:.1f} x", f"{median['torch']:.1f}" if "torch" in median else "",
        )  # fmt: skip
    Console().print(table)


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1800, 4096], help="of prompts")
    parser.add_argument("--streams", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the raw figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
