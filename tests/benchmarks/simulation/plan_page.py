"""A plan as lines for a terminal and as a page: what each fleet bears."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from simulation.costs import StepCosts
from simulation.plan import Outcome, Plan, SimulatedLevel

from shoal_lab.report.page import Heading, Paragraph, Part, Plot, Table, render
from shoal_lab.report.plots import Line, line_plot

_DASH = "-"
Cells = tuple[Sequence[str], Sequence[Sequence[str]], str]
"""Columns, rows, and a caption."""


def render_plan(plan: Plan, costs: StepCosts) -> str:
    """One self-contained HTML page."""
    parts: list[Part] = [
        Paragraph(headline(plan)),
        *(Paragraph(f"Beware: {line}") for line in warnings(plan)),
        Heading("Goodput by ratio and skip count"),
        Plot(goodput_plot(plan), f"Of {_replicas(plan)}: requests a second within both SLOs."),
        Table(*outcome_table(plan), marked=plan.outcomes.index(plan.best)),
        Heading(f"{plan.best.fleet.name}, by rate"),
        Table(*level_table(plan.best)),
        Heading("How this was made"),
        Paragraph(
            "The scheduler, the blocks and the ladder are Shoal's own; time is what the costs say. "
            "Requests are those that shoal bench sends by the same seed and mix."
        ),
        Table(("", ""), list(_settings(plan, costs))),
    ]
    return render(f"A plan for {plan.model}", parts)


def summarize_plan(plan: Plan) -> list[str]:
    """For the terminal."""
    lines = aligned(*outcome_table(plan)[:2])
    lines += ["", f"{plan.best.fleet.name}, by rate:", *aligned(*level_table(plan.best)[:2])]
    lines += ["", *(f"warning: {line}" for line in warnings(plan))]
    return [*lines, headline(plan)]


def warnings(plan: Plan) -> list[str]:
    """Of the loads that are shown, each sentence once."""
    loads: dict[str, list[str]] = {}
    for outcome in plan.outcomes:
        shown = outcome.levels if outcome is plan.best else filter(None, [outcome.at_goodput])
        for one in shown:
            for warning in one.level.warnings:
                loads.setdefault(warning, []).append(f"{outcome.fleet.name}, at {one.level.load.name}")
    return [
        f"{names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''}: {warning}"
        for warning, names in loads.items()
    ]


def headline(plan: Plan) -> str:
    best = plan.best
    if not best.goodput:
        return "Goodput: none. At no rate did enough requests meet both SLOs: see --mix and its SLOs."
    more = "" if best.is_saturated else " or more: no rate that was simulated failed; try higher ones"
    return f"Best: {best.fleet.name}, goodput {_rate(best.goodput)} requests/s{more}."


def goodput_plot(plan: Plan) -> str:
    """SVG: goodput over the number of prefill replicas, a line for each skip count."""
    skips = sorted({one.fleet.skip_layers for one in plan.outcomes})
    chosen = {
        skip: sorted(
            (one.fleet.num_prefill, one.goodput) for one in plan.outcomes if one.fleet.skip_layers == skip
        )
        for skip in skips
    }  # fmt: skip
    lines = [
        Line(f"{skip} skipped", *(list(axis) for axis in zip(*points, strict=True))) for skip, points in chosen.items()
    ]
    return line_plot(lines, x_label="prefill replicas", y_label="goodput (requests/s)")


def outcome_table(plan: Plan) -> Cells:
    columns = ("prefill", "decode", "skipped", "goodput", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99",
               "prefill busy", "decode busy", "fallbacks")  # fmt: skip
    rows = [
        (
            str(one.fleet.num_prefill), str(one.fleet.num_decode), str(one.fleet.skip_layers),
            _rate(one.goodput), *_figures(one.at_goodput),
        )
        for one in plan.outcomes
    ]  # fmt: skip
    caption = (
        "Times in ms at the goodput. Busy: the mean share of the time in which a replica's step ran. A goodput is "
        "known to an eighth of itself, so fleets within an eighth of the highest one count as equal: marked as the "
        "best of them is that which skips the fewest layers, and then that of the fewest replicas."
    )
    return columns, rows, caption


def level_table(outcome: Outcome) -> Cells:
    columns = ("requests/s", "requests", "failed", "both SLOs (%)", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99",
               "prefill busy", "decode busy", "fallbacks")  # fmt: skip
    rows = [
        (
            _rate(one.level.load.value), str(one.level.overall.num_requests), str(one.level.overall.num_failed),
            f"{100 * one.level.overall.attained.value:.1f}", *_figures(one),
        )
        for one in outcome.levels
    ]  # fmt: skip
    return columns, rows, "Times in ms."


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """As columns of text, aligned on the right."""
    widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)
    ]  # fmt: skip


# --- helpers --------------------------------------------------------------------------------------------


def _settings(plan: Plan, costs: StepCosts) -> Iterator[tuple[str, str]]:
    yield "machine", plan.machine
    total = sum(one.share for one in plan.mix)
    for one in plan.mix:
        yield (
            f"{100 * one.share / total:.0f} % of requests",
            f"{one.name} (prompt:output tokens), TTFT {one.slo.ttft_ms:g} ms, TPOT {one.slo.tpot_ms:g} ms",
        )
    amount = plan.amount
    counted = f"{amount.num_requests} requests" if amount.num_requests else f"requests of {amount.duration_s:g} s"
    yield "counted", f"{counted} of each load, after {amount.warm_up} that only warm up"
    yield "seed", str(plan.seed)
    for name, fit in costs.fits.items():
        yield (
            f"fit of {name}",
            f"off by {100 * fit.median_error:.1f} % (median), {100 * fit.max_error:.1f} % (most) of {fit.num} times",
        )


def _figures(found: SimulatedLevel | None) -> tuple[str, ...]:
    if found is None:
        return (_DASH,) * 9
    overall, usage = found.level.overall, found.usage
    times = (overall.ttft_s.p50, overall.ttft_s.p90, overall.ttft_s.p99,
             overall.tpot_s.p50, overall.tpot_s.p90, overall.tpot_s.p99)  # fmt: skip
    return (
        *(_DASH if time is None else f"{1e3 * time:.1f}" for time in times),
        f"{100 * usage.prefill_busy:.0f} %", f"{100 * usage.decode_busy:.0f} %", str(usage.num_fallbacks),
    )  # fmt: skip


def _rate(rate: float) -> str:
    return f"{rate:.3g}" if rate < 1000 else f"{rate:.0f}"


def _replicas(plan: Plan) -> str:
    totals = {one.fleet.num_replicas for one in plan.outcomes}
    return f"{totals.pop()} replicas" if len(totals) == 1 else "all fleets"
