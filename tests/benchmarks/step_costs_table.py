"""Step costs, printed: each formula's coefficients, and how far it is from what was measured."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from simulation.costs import StepCosts


def show(costs: StepCosts) -> None:
    table = Table(title=f"{costs.model} on {costs.machine}")
    for column in ("formula", "a step (ms)", "a token or sequence (ms)", "a token seen (ns)", "a token read (ns)"):
        table.add_column(column, justify="left" if column == "formula" else "right")
    for one in costs.prefill:
        numbers = _row(one.step_s, one.token_s, one.token_context_s, one.context_token_s)
        table.add_row(f"prefill, {one.skip_layers} skipped", *numbers)
    decode = costs.decode
    name = f"decode, beyond {decode.free_sequences} sequences" if decode.free_sequences else "decode"
    table.add_row(name, *_row(decode.step_s, decode.sequence_s, 0.0, decode.context_token_s))
    console = Console()
    console.print(table)
    handoff, serving, sharing = costs.handoff, costs.serving, costs.sharing
    console.print(f"hand-off {1e3 * handoff.latency_s:.1f} ms and {handoff.bytes_per_s / 1e9:.2f} GB/s")
    console.print(
        f"serving {1e3 * serving.request_s:.1f} ms a request, {1e3 * serving.step_s:.2f} ms a step, "
        f"{1e3 * serving.token_s:.3f} ms a token"
    )
    if sharing is not None:
        console.print(f"two stages that share {sharing.cores} cores get {sharing.efficiency:.2f} of their work done")
    for name, quality in costs.fits.items():
        console.print(
            f"{name}: off by {quality.median_error:.1%} (median), {quality.max_error:.1%} (most) of {quality.num} times"
        )


def _row(step_s: float, unit_s: float, seen_s: float, read_s: float) -> tuple[str, ...]:
    return f"{1e3 * step_s:.2f}", f"{1e3 * unit_s:.4f}", f"{1e9 * seen_s:.3f}", f"{1e9 * read_s:.1f}"
