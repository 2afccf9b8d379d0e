"""What a GPU makes of it: prefill at both depths, and decode steps with and without CUDA graphs. Weights are random.

    python tests/benchmarks/gpu.py [--rounds 5] [--json FILE]
    python tests/benchmarks/gpu.py --shape tiny --device cpu        # seconds, to see that all of it runs

Prefill is the time from prompts' ids to the first token of all of them, the boundary token in the same forward, logits
of last tokens only, by torch's operators and with Shoal's Triton kernels between the products; full depth's FLOPs over
its time stand beside the rate of one large product in the same run. Decode is the time of a step in which each sequence
gets a token, by torch and by Triton, one operation after the other and as a graph. Beside it stands
what share of the memory's read rate, measured in the same run, it is to read all weights and the K/V of all sequences
once, and how far the next token's distribution is from that of the first way (KL, nats). What is compared takes turns.

On a CPU "graphs" are none: the same step, filled up as for one, is run again; and Triton takes part only by its
interpreter (TRITON_INTERPRET=1, float32).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from random_model import SHAPES, Shape, make_engine
from ratios import median_ratio
from rich.console import Console
from rich.progress import track
from rich.table import Table
from step_times import begin
from work import prefill_flops, weight_bytes

from shoal.backends.attention import prepare_attention
from shoal.backends.gpu.cuda_graph import CudaGraphs
from shoal.backends.gpu.gpu import find_gpu_kernels
from shoal.backends.gpu.step_graph import StepGraphs
from shoal.engine.engine import Engine
from shoal.errors import ConfigError
from shoal.model.decoder import Decoder
from shoal.model.plan import LayerPlan
from shoal.wire.messages import Depth, SamplingParams

GOAL = 1.40
"""Full over shallow, at the middle of the prompts' lengths."""
TORCH, TRITON = "torch", "Triton"
EAGER = "torch, one by one"


class Again:
    """Stands in for a graph where there are none."""

    def __init__(self) -> None:
        self._run: Callable[[], None] = lambda: None

    def capture(self, run: Callable[[], None]) -> None:
        self._run = run

    def replay(self) -> None:
        self._run()


def main() -> None:
    options = _options()
    shape, device, dtype = SHAPES[options.shape], torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    with torch.inference_mode():
        prepare_attention(device)
        engine = make_engine(shape, dtype, device, options.chunk)
        decoders = make_decoders(engine)
        result = {
            "settings": {name: value for name, value in vars(options).items() if name != "json"},
            "machine": {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
                "torch": torch.__version__,
            },
            "skip_layers": shape.skip_layers,
            "layers": engine.runner.decoder.spec.num_layers,
            "read_bytes_per_s": (bandwidth := memory_bytes_per_s(shape.read_bytes, device)),
            "product_flops_per_s": (peak := product_flops_per_s(shape.product_size, dtype, device)),
            "prefill": (prefill := prefill_rows(engine, decoders, shape, options.rounds, peak)),
            "goal": goal_of(prefill, shape),
            "decode": [],
        }
        tell(result, options.json)  # whatever becomes of the rest
        result["decode"] = decode_rows(engine, make_ways(engine, decoders, shape), shape, options, bandwidth)
    tell(result, options.json)


def tell(result: dict[str, Any], file: str | None) -> None:
    show(result)
    if file:
        Path(file).write_text(json.dumps(result, indent=2) + "\n")


def make_decoders(engine: Engine) -> dict[str, Decoder]:
    """By whose kernels; Triton's last, or without it, and a line that says so, where that can't be had."""
    runner, theirs = engine.runner, engine.runner.decoder
    decoders = {TORCH: theirs}
    try:
        ours = find_gpu_kernels(theirs.spec, theirs.dtype, runner.pool.dtype, runner.pool.layers[0].device)
        decoders[TRITON] = ours.decoder(theirs.spec, theirs.plan, theirs.stage, theirs.parameters)
    except ConfigError as error:
        Console(stderr=True).print(f"[yellow]without Triton: {error.message}")
    return decoders


@dataclass(frozen=True)
class Way:
    """To carry out a step that only decodes; without ``graphs`` one operation after the other."""

    decoder: Decoder
    graphs: StepGraphs | None

    def take(self, engine: Engine) -> None:
        engine.runner.decoder, engine.runner.decode_path = self.decoder, self.graphs

    def logits(self, engine: Engine) -> torch.Tensor:
        """Of the next step, which stays the next."""
        rows, runner = engine.scheduler.schedule().rows, engine.runner
        if self.graphs is not None:
            found = self.graphs.run(rows)
        else:
            found = self.decoder.forward(runner.batch(rows), runner.pool).logits
        assert found is not None
        return found.double()


def make_ways(engine: Engine, decoders: dict[str, Decoder], shape: Shape) -> dict[str, Way]:
    pool = engine.runner.pool
    new_graph = CudaGraphs(device) if (device := pool.layers[0].device).type == "cuda" else Again
    ways: dict[str, Way] = {}
    for name, decoder in decoders.items():
        graphs = StepGraphs(decoder, pool, new_graph, max(shape.streams), reads_padding=name == TORCH)
        ways |= {f"{name}, one by one": Way(decoder, None), f"{name}, graphs": Way(decoder, graphs)}
    return ways


def graphs_of(ways: dict[str, Way]) -> dict[str, StepGraphs]:
    return {name: way.graphs for name, way in ways.items() if way.graphs is not None}


def product_flops_per_s(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Of the best of ten square products."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return float(2 * size**3 / min(_seconds(device, lambda: left @ right) for _ in range(10)))


def memory_bytes_per_s(num_bytes: int, device: torch.device) -> float:
    """The better of a sum, which reads, and a copy, which reads and writes."""
    values = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(values)
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(10):
        times[1].append(_seconds(device, values.sum))
        times[2].append(_seconds(device, lambda: target.copy_(values)))
    return max(factor * num_bytes / min(found) for factor, found in times.items())


def prefill_rows(
    engine: Engine, decoders: dict[str, Decoder], shape: Shape, rounds: int, peak: float
) -> list[dict[str, Any]]:
    rows, spec = [], engine.runner.decoder.spec
    full = LayerPlan(spec.num_layers, 0)
    for batch in shape.batches:
        for num_tokens in shape.prompt_tokens:
            prompts = [
                tuple(torch.randint(2, shape.config["vocab_size"], (num_tokens,)).tolist()) for _ in range(batch)
            ]
            seconds: dict[tuple[str, Depth], list[float]] = {
                (name, depth): [] for name in decoders for depth in (Depth.SHALLOW, Depth.FULL)
            }
            for number in track(range(rounds + 1), description=f"prefill, {batch} of {num_tokens:,} tokens"):
                for (name, depth), found in seconds.items():
                    engine.runner.decoder = decoders[name]
                    took_s = prefill_s(engine, prompts, depth)
                    if number:  # the first one warms up
                        found.append(took_s)
            engine.runner.decoder = decoders[TORCH]
            for name in decoders:
                taken = {depth: seconds[name, depth] for depth in (Depth.SHALLOW, Depth.FULL)}
                median = {depth: statistics.median(found) for depth, found in taken.items()}
                rows.append(
                    {
                        "batch": batch, "tokens": num_tokens, "kernels": name, "median_s": median, "seconds": taken,
                        "full_over_shallow": median_ratio(taken[Depth.FULL], taken[Depth.SHALLOW]),
                        "ideal": _ideal(engine, num_tokens),
                        "share_of_products": batch * prefill_flops(spec, full, num_tokens) / median[Depth.FULL] / peak,
                    }
                )  # fmt: skip
    return rows


def prefill_s(engine: Engine, prompts: Sequence[tuple[int, ...]], depth: Depth) -> float:
    """Until all have their first token."""

    def answer() -> None:
        for index, prompt in enumerate(prompts):
            engine.submit_generate(str(index), prompt, depth, SamplingParams(max_tokens=1, temperature=0.0))
        num_tokens = 0
        while num_tokens < len(prompts):
            output = engine.step()
            for failure in output.failures:
                raise failure.error
            num_tokens += len(output.tokens)

    return _seconds(engine.runner.pool.layers[0].device, answer)


def _ideal(engine: Engine, num_tokens: int) -> float:
    """Full over shallow by FLOPs."""
    decoder = engine.runner.decoder
    full = LayerPlan(decoder.plan.num_layers, 0)
    return prefill_flops(decoder.spec, full, num_tokens) / prefill_flops(decoder.spec, decoder.plan, num_tokens)


def decode_rows(
    engine: Engine, ways: dict[str, Way], shape: Shape, options: Any, bandwidth: float
) -> list[dict[str, Any]]:
    rows, spec, pool = [], engine.runner.decoder.spec, engine.runner.pool
    for streams in shape.streams:
        num_bytes = weight_bytes(spec, pool.dtype.itemsize) + streams * shape.context * pool.layout.token_bytes
        measured = measure_steps(engine, ways, streams, shape.context, options)
        median = {name: statistics.median(found) for name, found in measured.seconds.items()}
        rows.append(
            {
                "streams": streams, "context": shape.context, "bytes": num_bytes,
                "filled_up_to": {name: asdict(graphs.sizes[-1]) for name, graphs in graphs_of(ways).items()},
                "median_s": median, "seconds": measured.seconds,
                "kl_from_one_by_one": {name: statistics.fmean(found) for name, found in measured.divergences.items()},
                "share_of_bandwidth": {name: num_bytes / took_s / bandwidth for name, took_s in median.items()},
            }
        )  # fmt: skip
    return rows


@dataclass(frozen=True)
class Steps:
    """What steps took by each way, and how far (KL, nats) their distributions were from those of the first."""

    seconds: dict[str, list[float]]
    divergences: dict[str, list[float]]


def measure_steps(engine: Engine, ways: dict[str, Way], streams: int, context: int, options: Any) -> Steps:
    """All ways in turns, on the same sequences."""
    device = engine.runner.pool.layers[0].device
    steps = Steps({name: [] for name in ways}, {name: [] for name in ways if name != EAGER})
    with _running(engine, streams, context):
        for _ in track(range(options.rounds), description=f"decode, {streams} sequences"):
            for name, found in steps.seconds.items():
                ways[name].take(engine)
                _step(engine, streams)  # captures, where it's the first
                if (graphs := ways[name].graphs) is not None and not any(size.rows >= streams for size in graphs.sizes):
                    raise SystemExit(f"{name}: no graph was captured, the log says why; prefill's figures stand above")
                found += [_seconds(device, lambda: _step(engine, streams)) for _ in range(options.steps)]
            exact = ways[EAGER].logits(engine).log_softmax(-1)
            for name, found in steps.divergences.items():
                ours = ways[name].logits(engine).log_softmax(-1)
                found.append(float((exact.exp() * (exact - ours)).sum(-1).mean()))
    ways[EAGER].take(engine)
    return steps


@contextmanager
def _running(engine: Engine, streams: int, context: int) -> Iterator[None]:
    begin(engine, streams, context, "decode")
    yield
    for index in range(streams):
        engine.finish(f"decode, {index}")


def _step(engine: Engine, streams: int) -> None:
    if (num_tokens := len(engine.step().tokens)) != streams:
        raise SystemExit(f"{num_tokens} tokens of {streams} sequences: raise the pool")


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    _finish(device)
    started_s = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - started_s


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def goal_of(prefill: Sequence[dict[str, Any]], shape: Shape) -> dict[str, Any]:
    tokens, kernels = shape.prompt_tokens[1], prefill[-1]["kernels"]
    least = min(row["full_over_shallow"] for row in prefill if (row["tokens"], row["kernels"]) == (tokens, kernels))
    return {
        "tokens": tokens, "kernels": kernels, "full_over_shallow": least, "wanted": GOAL, "is_reached": least >= GOAL
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    skipped, console = f"{result['skip_layers']} of {result['layers']} layers skipped", Console()
    prefill = Table(title=f"{result['settings']['shape']} on {result['machine']['device']}: prefill, {skipped}")
    for column in ("prompts", "tokens", "kernels", "full, ms", "of peak", "shallow, ms", "ratio", "by FLOPs"):
        prefill.add_column(column, justify="left" if column == "kernels" else "right")
    for row in result["prefill"]:
        full, shallow = (f"{row['median_s'][name] * 1e3:.2f}" for name in ("full", "shallow"))
        ratios = (f"{row[name]:.2f}" for name in ("full_over_shallow", "ideal"))
        share = f"{row['share_of_products']:.2f}"
        prefill.add_row(str(row["batch"]), f"{row['tokens']:,}", row["kernels"], full, share, shallow, *ratios)
    console.print(prefill)
    decode = Table(title="a decode step")
    for column in ("sequences", "context", "", "ms", "tokens/s", "of memory's read rate", "KL"):
        decode.add_column(column, justify="right" if column else "left")
    for row in result["decode"]:
        for name, took_s in row["median_s"].items():
            decode.add_row(
                str(row["streams"]), f"{row['context']:,}", name, f"{took_s * 1e3:.2f}",
                f"{row['streams'] / took_s:.0f}", f"{row['share_of_bandwidth'][name]:.2f}",
                "" if name == EAGER else f"{row['kl_from_one_by_one'][name]:.1e}",
            )  # fmt: skip
    if result["decode"]:
        console.print(decode)
    goal = result["goal"]
    console.print(
        f"memory is read at {result['read_bytes_per_s'] / 1e9:.0f} GB/s, "
        f"products run at {result['product_flops_per_s'] / 1e12:.2f} TFLOP/s"
    )
    console.print(
        f"goal: full / shallow at {goal['tokens']:,} tokens by {goal['kernels']} {goal['full_over_shallow']:.2f}, "
        f"wanted {goal['wanted']:.2f}: {'reached' if goal['is_reached'] else 'not reached'}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--chunk", type=int, default=8192, help="tokens a forward runs at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="decode steps of each kind in a round")
    parser.add_argument("--json", help="write the raw figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
