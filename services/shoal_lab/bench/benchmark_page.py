"""A benchmark as a page: what was reached, a table of each kind of latency, and the curves against load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict

from shoal_lab.bench.benchmark import Benchmark
from shoal_lab.bench.level import GOODPUT_SHARE, Level
from shoal_lab.bench.summary import Percentiles, Share, Summary
from shoal_lab.report.page import Heading, Paragraph, Part, Plot, Table, render
from shoal_lab.report.plots import Line, line_plot

_DASH = "-"


def latency_plot(
    benchmark: Benchmark, latency: Callable[[Summary], Percentiles], name: str, slo_ms: float | None = None
) -> str:
    """SVG: p50, p90 and p99 in milliseconds, on a logarithmic axis, against load. An SLO is a line across."""
    levels = _by_load(benchmark)
    lines = [
        Line(label, [one.load.value for one, _ in points], [1e3 * value for _, value in points])
        for label in ("p50", "p90", "p99")
        for points in [[(one, getattr(latency(one.overall), label)) for one in levels if latency(one.overall).num]]
    ]
    if slo_ms is not None:
        lines.append(_across("SLO", levels, slo_ms))
    return line_plot(lines, x_label=_x_label(benchmark), y_label=f"{name} (ms)", logarithmic=True)


def share_plot(benchmark: Benchmark) -> str:
    """SVG: the share of requests within both SLOs, and within each, against load; goodput's share is a line across."""
    levels = _by_load(benchmark)
    loads = [level.load.value for level in levels]
    shares: dict[str, Callable[[Summary], Share]] = {
        "both SLOs": lambda summary: summary.attained,
        "TTFT": lambda summary: summary.attained_ttft,
        "TPOT": lambda summary: summary.attained_tpot,
    }
    lines = [
        Line(label, loads, [100 * share_of(level.overall).value for level in levels])
        for label, share_of in shares.items()
    ]
    lines.append(_across("goodput needs", levels, 100 * GOODPUT_SHARE))
    return line_plot(lines, x_label=_x_label(benchmark), y_label="requests within (%)")


def render_benchmark(benchmark: Benchmark) -> str:
    """One self-contained HTML page. There must be a level."""
    parts: list[Part] = [
        *(Paragraph(line) for line in _headline(benchmark)),
        *_warnings(benchmark),
        *_shares(benchmark),
        *_latencies(benchmark),
        *_failures(benchmark),
        *_classes(benchmark),
        Heading("How this was made"),
        Paragraph(
            "TTFT: from sending a request to the first chunk with a token. E2E: to the last one. TPOT: (E2E - TTFT) / "
            "(output tokens - 1). ITL: the gap between two chunks with tokens. Percentiles interpolate linearly, and "
            "are over requests that were answered in full; shares are over all that count, and one that failed or was "
            "rejected met no SLO. Goodput is the highest rate at which at least "
            f"{100 * GOODPUT_SHARE:.0f} % of requests meet both."
        ),
        Table(("", ""), list(_settings(benchmark))),
    ]
    return render(f"{benchmark.settings.model} under load", parts)


def summarize_benchmark(benchmark: Benchmark) -> list[str]:
    """For the terminal: a line a load, the warnings, and the goodput."""
    lines = [
        f"{level.load.name}: {_percent(level.overall.attained)} % of {level.overall.num_requests} within both SLOs, "
        f"{level.overall.num_failed} failed; ms at p50/p90/p99: TTFT {_triple(level.overall.ttft_s)}, "
        f"TPOT {_triple(level.overall.tpot_s)}"
        for level in benchmark.levels
    ]
    lines += [f"warning: {level.load.name}: {warning}" for level in benchmark.levels for warning in level.warnings]
    return lines + _headline(benchmark)


# --- the parts ------------------------------------------------------------------------------------------


def _headline(benchmark: Benchmark) -> list[str]:
    if benchmark.goodput is None:
        return []
    if not benchmark.goodput:
        return ["Goodput: none. At no rate that was measured did enough requests meet both SLOs; try lower ones."]
    more = "" if benchmark.is_saturated else " or more: no rate that was measured failed; try higher ones"
    return [f"Goodput: {benchmark.goodput:g} requests/s{more}."]


def _warnings(benchmark: Benchmark) -> Iterator[Part]:
    loads: dict[str, list[str]] = {}
    for level in benchmark.levels:
        for warning in level.warnings:
            loads.setdefault(warning, []).append(level.load.name)
    for warning, names in loads.items():
        yield Paragraph(f"Beware ({', '.join(names)}): {warning}")


def _shares(benchmark: Benchmark) -> Iterator[Part]:
    levels = _by_load(benchmark)
    yield Heading("Requests within their SLOs")
    yield Plot(share_plot(benchmark), "Of all requests that count, those that failed included.")
    rows = [
        (
            _x(level), str(level.overall.num_requests), str(level.overall.num_failed),
            _with_interval(level.overall.attained), _percent(level.overall.attained_ttft),
            _percent(level.overall.attained_tpot),
        )
        for level in levels
    ]  # fmt: skip
    rates = [level.load.value for level in levels]
    yield Table(
        (_x_label(benchmark), "requests", "failed", "both SLOs (%)", "TTFT (%)", "TPOT (%)"),
        rows,
        "In brackets: 95 % intervals (Wilson). " + ("Goodput is marked." if benchmark.goodput else ""),
        marked=rates.index(benchmark.goodput) if benchmark.goodput in rates else None,
    )
    yield Table(
        (_x_label(benchmark), "window (s)", "answers/s", "output tokens/s", "prompt tokens", "output tokens",
         "late, p99 (ms)", "generator's CPU (%)"),
        [
            (
                _x(level), f"{level.overall.window_s:.1f}", f"{level.overall.requests_per_s:.2f}",
                f"{level.overall.output_tokens_per_s:.1f}", _plain(level.overall.prompt_tokens),
                _plain(level.overall.output_tokens), _ms(level.lateness_s.p99), f"{100 * level.cpu_share:.0f}",
            )
            for level in levels
        ],
        f"The window is {_window(benchmark)}; prompt and output tokens are means. Late: how long after it was due a "
        "request was sent, which no latency includes.",
    )  # fmt: skip


def _latencies(benchmark: Benchmark) -> Iterator[Part]:
    levels = _by_load(benchmark)
    slos = {one.slo for one in benchmark.settings.mix}
    slo = slos.pop() if len(slos) == 1 else None
    latencies: list[tuple[str, Callable[[Summary], Percentiles], float | None]] = [
        ("TTFT", lambda summary: summary.ttft_s, slo.ttft_ms if slo else None),
        ("TPOT", lambda summary: summary.tpot_s, slo.tpot_ms if slo else None),
        ("ITL", lambda summary: summary.itl_s, None),
        ("E2E", lambda summary: summary.e2e_s, None),
    ]
    for name, latency, slo_ms in latencies:
        yield Heading(name)
        yield Plot(latency_plot(benchmark, latency, name, slo_ms), "Requests answered in full.")
        yield Table(
            (_x_label(benchmark), "values", "mean (ms)", "p50", "p90", "p99", "max"),
            [(_x(level), *_row(latency(level.overall))) for level in levels],
        )


def _failures(benchmark: Benchmark) -> Iterator[Part]:
    kinds = list(dict.fromkeys(kind for level in benchmark.levels for kind in level.overall.failures))
    if not kinds:
        return
    yield Heading("Failures")
    yield Table(
        (_x_label(benchmark), *kinds),
        [(_x(level), *(str(level.overall.failures.get(kind, 0)) for kind in kinds)) for level in _by_load(benchmark)],
    )
    for kind in kinds:
        told = next(
            record
            for level in benchmark.levels
            for record in level.records
            if record.failure is kind and record.is_counted
        )
        status = f"HTTP {told.status}: " if told.status not in {None, 200} else ""
        yield Paragraph(f"The first {kind}: {status}{told.detail}")


def _classes(benchmark: Benchmark) -> Iterator[Part]:
    """Each class by itself, where there are several."""
    for index, one in enumerate(benchmark.settings.mix if len(benchmark.settings.mix) > 1 else ()):
        yield Heading(f"Class {one.name}")
        yield Table(
            (_x_label(benchmark), "requests", "failed", "both SLOs (%)", "TTFT p50 (ms)", "p90", "p99",
             "TPOT p50 (ms)", "p90", "p99"),
            [
                (
                    _x(level), str(own.num_requests), str(own.num_failed), _percent(own.attained),
                    *map(_ms, (own.ttft_s.p50, own.ttft_s.p90, own.ttft_s.p99)),
                    *map(_ms, (own.tpot_s.p50, own.tpot_s.p90, own.tpot_s.p99)),
                )
                for level in _by_load(benchmark)
                for own in [level.summaries[1 + index]]
            ],
            f"SLOs: TTFT {one.slo.ttft_ms:g} ms, TPOT {one.slo.tpot_ms:g} ms.",
        )  # fmt: skip


def _settings(benchmark: Benchmark) -> Iterable[tuple[str, str]]:
    settings = benchmark.settings
    total = sum(one.share for one in settings.mix)
    yield "endpoint", settings.url
    yield "model", settings.model
    for one in settings.mix:
        yield (
            f"{100 * one.share / total:.0f} % of requests",
            f"{one.name} (prompt:output tokens), TTFT {one.slo.ttft_ms:g} ms, TPOT {one.slo.tpot_ms:g} ms",
        )
    ids = f", {settings.token_ids[0]} to {settings.token_ids[1]}" if settings.prompts == "ids" else ""
    yield "prompts", f"{settings.prompts}{ids}"
    amount = settings.amount
    more = "" if benchmark.levels[0].load.is_open else ", or one for each client if that is more"
    yield "warm-up, not counted", f"the first {amount.warm_up} requests of each load{more}"
    counted = f"{amount.num_requests} requests" if amount.num_requests else f"requests of {amount.duration_s:g} s"
    yield "counted", f"{counted} of each load"
    yield "output tokens counted by", ", ".join(sorted(_token_sources(benchmark))) or _DASH
    yield "ignore_eos", str(settings.ignore_eos).lower()
    yield "also in each body", str(settings.extra_body) if settings.extra_body else _DASH
    yield "time that a request has", f"{settings.timeout_s:g} s"
    yield "seed", str(settings.seed)
    yield "started", settings.started_at


# --- helpers --------------------------------------------------------------------------------------------


def _by_load(benchmark: Benchmark) -> list[Level]:
    """A sweep measures them in another order."""
    return sorted(benchmark.levels, key=lambda level: level.load.value)


def _across(label: str, levels: Sequence[Level], value: float) -> Line:
    return Line(label, [levels[0].load.value, levels[-1].load.value], [value, value])


def _token_sources(benchmark: Benchmark) -> set[str]:
    return {
        str(record.tokens_from)
        for level in benchmark.levels
        for record in level.records
        if record.is_counted and record.failure is None
    }


def _x(level: Level) -> str:
    return f"{level.load.value:g}"


def _x_label(benchmark: Benchmark) -> str:
    return "requests/s" if benchmark.levels[0].load.is_open else "requests at a time"


def _window(benchmark: Benchmark) -> str:
    if benchmark.levels[0].load.is_open:
        return "from the first request that counts to the last one's end"
    return "from the first sending that counts to the last one, and has what warmed up and ended in it, too"


def _row(found: Percentiles) -> tuple[str, ...]:
    values = asdict(found)
    return (str(values.pop("num")), *(_ms(value) for value in values.values()))


def _triple(found: Percentiles) -> str:
    return "/".join(_ms(value) for value in (found.p50, found.p90, found.p99))


def _ms(seconds: float | None) -> str:
    return _DASH if seconds is None else f"{1e3 * seconds:.1f}"


def _plain(number: float | None) -> str:
    return _DASH if number is None else f"{number:.1f}"


def _percent(found: Share) -> str:
    return f"{100 * found.value:.1f}"


def _with_interval(found: Share) -> str:
    return f"{_percent(found)} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
