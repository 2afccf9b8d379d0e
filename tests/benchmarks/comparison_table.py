"""A comparison for the terminal: speeds as ratios, each as a share of what the machine can do, and the quality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import work
from arms import Arm
from comparison import Comparison, Measured, Metric
from load import LoadOptions
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from shoal.model.families import ModelSpec
from shoal.model.plan import LayerPlan

_BUSY = 0.1
_ELEMENT_BYTES = {"int8": 1, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Shape:
    """What the shares of limits are computed from."""

    spec: ModelSpec
    load: LoadOptions

    def weight_bytes(self, arm: Arm) -> int:
        """What a greedy step of one stream reads of them: of int8 without the scales, less than a hundredth."""
        if arm.weights_file is not None:
            return arm.weights_file.stat().st_size
        num_head = self.spec.vocab_size * self.spec.hidden_size
        more = _ELEMENT_BYTES[arm.head or arm.weights] - _ELEMENT_BYTES[arm.weights]
        return work.weight_bytes(self.spec, _ELEMENT_BYTES[arm.weights]) + more * num_head


def show(comparison: Comparison, shape: Shape, console: Console) -> None:
    console.print(Group(*_parts(comparison, shape)))


def _parts(comparison: Comparison, shape: Shape) -> Iterator[RenderableType]:
    yield _speeds(comparison, shape.load)
    yield from _failures(comparison)
    if comparison.limits:
        yield _shares(comparison, shape)
        yield _limits(comparison)
        yield from _hand_off(comparison, shape)
    yield _quality(comparison)
    busy = max(comparison.busy.values(), default=0.0)
    if busy > _BUSY:
        yield (
            f"[yellow]warning: others used up to {busy:.0%} of the cores as a round began: "
            "these timings are worth little[/]"
        )


def _speeds(comparison: Comparison, load: LoadOptions) -> Table:
    table = Table(
        title=f"a prompt of {load.prompt_tokens} tokens alone; "
        f"streams of {load.stream_prompt_tokens} + {load.stream_output_tokens} tokens",
        caption=f"in brackets: how many times as fast as {comparison.baseline}, the median of ratios within a round",
    )
    table.add_column("arm", no_wrap=True)
    table.add_column("cores", no_wrap=True)
    for metric in comparison.metrics:
        table.add_column(f"{metric.name}\n{'ms' if metric.is_time else 'tok/s'}", justify="right", no_wrap=True)
    for name, measured in comparison.measured.items():
        if measured.rounds:
            cells = (_cell(comparison, name, metric) for metric in comparison.metrics)
            table.add_row(name, measured.mode, *cells)
    return table


def _cell(comparison: Comparison, name: str, metric: Metric) -> str:
    median, speed = comparison.measured[name].median(metric), comparison.speed(name, metric)
    if median is None:
        return ""
    value = f"{1e3 * median:.1f}" if metric.is_time else f"{median:.1f}"
    return value if speed is None else f"{value}\n({speed:.2f})"


def _failures(comparison: Comparison) -> Iterator[Table]:
    failed = [measured for measured in comparison.measured.values() if measured.failure is not None]
    if failed:
        table = Table("arm", "why it isn't measured, or not in every round", title="missing")
        for measured in failed:
            what = "skipped" if measured.arm.missing else "failed"
            table.add_row(measured.arm.name, escape(f"{what}: {measured.failure}"))
        yield table


def _shares(comparison: Comparison, shape: Shape) -> Table:
    table = Table(
        title="shares of the machine's limits",
        caption="what the arithmetic (or reading weights and K/V) would take at the limit, over what it took",
    )
    table.add_column("arm")
    for metric in comparison.metrics:
        of = "read" if metric.name == "TPOT" else "GEMM"
        table.add_column(f"{metric.name}\nof {of}", justify="right", no_wrap=True)
    for name, measured in comparison.measured.items():
        if measured.rounds:
            shares = [_share(comparison, measured, metric, shape) for metric in comparison.metrics]
            table.add_row(name, *("" if share is None else f"{share:.0%}" for share in shares))
    return table


def _share(comparison: Comparison, measured: Measured, metric: Metric, shape: Shape) -> float | None:
    median, gemm, read = measured.median(metric), comparison.limit("gemm_flops"), comparison.limit("read_bytes")
    if not median or not gemm or not read:
        return None
    spec, load = shape.spec, shape.load
    plan = LayerPlan(spec.num_layers, measured.arm.num_skipped)
    if metric.streams is not None:
        flops = work.prefill_flops(spec, plan, load.stream_prompt_tokens) + sum(
            work.step_flops(spec, load.stream_prompt_tokens + index) for index in range(1, load.stream_output_tokens)
        )
        return flops / load.stream_output_tokens * median / gemm
    if metric.name == "TTFT":
        return work.prefill_flops(spec, plan, load.prompt_tokens) / median / gemm
    weights = shape.weight_bytes(measured.arm)
    kv_bytes = 4 if measured.arm.weights == "float32" else 2
    return work.step_bytes(spec, load.prompt_tokens + load.output_tokens // 2, weights, kv_bytes) / median / read


def _limits(comparison: Comparison) -> str:
    rates = {
        "GEMM": (comparison.limit("gemm_flops"), "GFLOP/s"),
        "memory read": (comparison.limit("read_bytes"), "GB/s"),
        "loopback TCP": (comparison.limit("loopback_bytes"), "GB/s"),
        "shared-memory copy": (comparison.limit("shared_memory_bytes"), "GB/s"),
    }
    said = (f"{name} {rate / 1e9:.1f} {unit}" for name, (rate, unit) in rates.items() if rate)
    return "limits, medians over rounds: " + ", ".join(said)


def _hand_off(comparison: Comparison, shape: Shape) -> Iterator[str]:
    """What handing off adds to the time to the first token, beside what its bytes cost at the least on either way."""
    by_way = {
        measured.arm.is_handed_off: measured.median(Metric("TTFT"))
        for measured in comparison.measured.values()
        if measured.arm.is_handed_off is not None and not measured.arm.num_skipped
        if measured.arm.weights == "bfloat16"
    }
    handed, aggregated = by_way.get(True), by_way.get(False)
    loopback, memory = comparison.limit("loopback_bytes"), comparison.limit("shared_memory_bytes")
    if handed and aggregated and loopback and memory:
        num_bytes = shape.load.prompt_tokens * work.kv_bytes(shape.spec)
        yield (
            f"handing off at full depth adds {1e3 * (handed - aggregated):.1f} ms to TTFT; at the limit its "
            f"{num_bytes / 1e6:.1f} MB of K/V take {1e3 * num_bytes / memory:.1f} ms through shared memory, "
            f"{1e3 * num_bytes / loopback:.1f} over loopback"
        )


def _quality(comparison: Comparison) -> RenderableType:
    if not comparison.quality:
        return "quality: docs/figures has no evaluation with so many layers skipped; run shoal eval"
    table = Table(
        title="quality of what isn't full depth in bfloat16, of Shoal",
        caption="from docs/figures, by shoal eval: not measured in this run",
    )
    for column in ("what", "text", "passages", "perplexity, full", "so", "KL", "top-1 agreement"):
        table.add_column(column, justify="left" if column in {"what", "text"} else "right")
    for row in comparison.quality:
        table.add_row(
            row["treatment"], row["text"], str(row["passages"]), f"{row['full_perplexity']:.2f}",
            f"{row['perplexity']:.2f}", f"{row['divergence']:.3f}", f"{row['agreement']:.1%}",
        )  # fmt: skip
    return table
