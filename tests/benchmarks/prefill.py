"""How long a long prompt takes to encode: shallow, at full depth, with weights in int8, with torch's kernels, and in
transformers.

Interleaved in one run, which also measures what share of the machine's matrix products the full depth reaches.

    python tests/benchmarks/prefill.py [--tokens 1800] [--rounds 8] [--skip-layers 10] [--json FILE]
    python tests/benchmarks/prefill.py --tokens 2048 --chunk 4096 --beside-tokens 512 4096

Every time is that from a prompt's ids to its first token's logits, on all cores, nothing cached. Each round runs every
variant once, every other round from the last to the first, so that a drift of the machine, and who comes after whom,
meets all alike; ratios are medians of those within a round. ``--beside-tokens`` are more lengths, at full depth, each a
variant of its own; their FLOP/s are told as a share of those of ``--tokens``. What the shallow depth and int8 cost in
quality, ``shoal eval`` measures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from models import smollm2_reference
from ratios import median_ratio
from texts import passages
from work import prefill_flops

from shoal.cli.doctor import gemm_flops
from shoal.config import ShoalConfig, load_config
from shoal.engine.build import Served, build_engine, choose_kernels, load_parameters
from shoal.engine.engine import Engine
from shoal.model.int8 import Int8Matrix
from shoal.model.plan import LayerPlan
from shoal.wire.messages import Depth, SamplingParams, Stage


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    config = load_config(
        model={"skip_layers": options.skip_layers, "dtype": options.dtype, "projector": "paper"},
        decode={"max_step_tokens": options.chunk, "target_step_s": 600},  # nothing else cuts a prompt
    )
    served = Served.of(config)
    parameters = load_parameters(served, Stage.DECODE, torch.device("cpu"))
    engine, plain = (
        build_engine(_with_kernels(config, kernels), Stage.DECODE, served, parameters, device=torch.device("cpu"))
        for kernels in ("auto", "torch")
    )
    reference = smollm2_reference(served.dtype, attention="sdpa")
    prompt = _prompt(served, options.tokens)
    eight = _in_int8(config, served)
    variants: dict[str, Callable[[], None]] = {
        "shallow": lambda: _first_token(engine, prompt, Depth.SHALLOW),
        "full": lambda: _first_token(engine, prompt, Depth.FULL),
        "shallow, torch's kernels": lambda: _first_token(plain, prompt, Depth.SHALLOW),
        "full, torch's kernels": lambda: _first_token(plain, prompt, Depth.FULL),
        "transformers": lambda: _transformers(reference, prompt),
    }
    if eight is not None:
        variants["shallow, int8"] = lambda: _first_token(eight, prompt, Depth.SHALLOW)
        variants["full, int8"] = lambda: _first_token(eight, prompt, Depth.FULL)
    for length in options.beside_tokens:
        variants[_full(length)] = partial(_first_token, engine, _prompt(served, length), Depth.FULL)
    product_flops: list[float] = []
    # Where bfloat16 isn't multiplied natively, what the machine can do is what it does in float32.
    dtypes = {served.dtype, torch.float32}
    variants["matrix product"] = lambda: product_flops.append(max(gemm_flops(torch, each, 2048, 3) for each in dtypes))
    seconds = _measure(variants, options.rounds)
    del seconds["matrix product"]
    gemm = statistics.median(product_flops[1:])  # the first one warmed up
    median = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "threads": options.threads,
            "torch": torch.__version__,
        },
        "model": served.name,
        "dtype": str(served.dtype).removeprefix("torch."),
        "tokens": options.tokens,
        "skip_layers": served.plan.num_skipped,
        "layers": served.plan.num_layers,
        "seconds": seconds,
        "median_s": median,
        "full_over_shallow": median_ratio(seconds["full"], seconds["shallow"]),
        "transformers_over_full": median_ratio(seconds["transformers"], seconds["full"]),
        "flops_beside": {
            length: full_flops(served, length)
            / full_flops(served, options.tokens)
            * median_ratio(seconds["full"], seconds[_full(length)])
            for length in options.beside_tokens
        },
        "gemm_flops": gemm,
        "full_share_of_gemm": full_flops(served, options.tokens) / median["full"] / gemm,
        "ideal_full_over_shallow": ideal_ratio(served, options.tokens),
    }
    _show(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def _full(num_tokens: int) -> str:
    return f"full, {num_tokens} tokens"


def full_flops(served: Served, num_tokens: int) -> int:
    return prefill_flops(served.spec, LayerPlan(served.plan.num_layers, 0), num_tokens)


def ideal_ratio(served: Served, num_tokens: int) -> float:
    """Full over shallow by FLOPs, the boundary token fused and logits of the last token only."""
    return full_flops(served, num_tokens) / prefill_flops(served.spec, served.plan, num_tokens)


def _in_int8(config: ShoalConfig, served: Served) -> Engine | None:
    """``None`` where that isn't served: by torch's kernels."""
    device = torch.device("cpu")
    if choose_kernels(config.decode, served, device) is None:
        return None
    parameters = load_parameters(served, Stage.DECODE, device, hold=Int8Matrix.of)
    return build_engine(config, Stage.DECODE, served, parameters, device=device)


def _with_kernels(config: ShoalConfig, kernels: str) -> ShoalConfig:
    return config.model_copy(update={"decode": config.decode.model_copy(update={"kernels": kernels})})


def _first_token(engine: Engine, prompt: tuple[int, ...], depth: Depth) -> None:
    engine.submit_generate("bench", prompt, depth, SamplingParams(max_tokens=1, temperature=0.0))
    while not (output := engine.step()).tokens:
        for failure in output.failures:
            raise failure.error


def _transformers(model: Any, prompt: tuple[int, ...]) -> None:
    with torch.inference_mode():
        model(torch.tensor([prompt]), logits_to_keep=1, use_cache=True)


def _measure(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in track(range(rounds), description="rounds"):
        # Back and forth: who comes second finds weights in a large cache that who came first has read.
        for name, run in list(variants.items())[:: -1 if number % 2 else 1]:
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def _prompt(served: Served, num_tokens: int) -> tuple[int, ...]:
    text = "\n\n".join(passages().values())
    ids: list[int] = served.files.tokenizer().encode(text)
    return tuple((ids * (1 + num_tokens // len(ids)))[:num_tokens])


def _show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['model']}, {result['tokens']} tokens, {result['dtype']}, to the first token's logits")
    for column in ("variant", "median s", "min", "max"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, times in result["seconds"].items():
        table.add_row(name, f"{result['median_s'][name]:.3f}", f"{min(times):.3f}", f"{max(times):.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"full / shallow            {result['full_over_shallow']:.3f} (ideal {result['ideal_full_over_shallow']:.3f})"
    )
    console.print(f"transformers / full       {result['transformers_over_full']:.3f}")
    for depth in ("full", "shallow"):
        if f"{depth}, int8" in result["seconds"]:
            ratio = median_ratio(result["seconds"][depth], result["seconds"][f"{depth}, int8"])
            console.print(f"{depth}: bfloat16 / int8".ljust(26) + f"{ratio:.3f}")
    share = f"{result['full_share_of_gemm']:.2f} of {result['gemm_flops'] / 1e9:.0f} GFLOP/s"
    console.print(f"full, of matrix product   {share}")
    for length, flops in result["flops_beside"].items():
        console.print(f"FLOP/s, {length} / {result['tokens']}".ljust(26) + f"{flops:.3f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1800)
    parser.add_argument("--beside-tokens", type=int, nargs="+", default=[], help="more lengths, at full depth")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--skip-layers", type=int, default=None)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--chunk", type=int, default=2048, help="tokens a forward runs at most")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", help="write the raw figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
