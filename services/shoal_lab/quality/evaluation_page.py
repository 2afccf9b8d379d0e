"""An evaluation as a page: a table a task, and what each figure says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from shoal_lab.quality.arms import CALIBRATED
from shoal_lab.quality.evaluation import Evaluation
from shoal_lab.quality.limits import MIN_UNITS
from shoal_lab.quality.notes import introduce
from shoal_lab.quality.statistics import Interval
from shoal_lab.quality.subject import Treatment
from shoal_lab.quality.text_scores import ALL_KINDS, TextScore
from shoal_lab.report.page import Heading, Paragraph, Part, Plot, Table, render
from shoal_lab.report.plots import Line, line_plot

_INTERVALS = "In brackets: 95 % bootstrap intervals."


def loss_plot(evaluation: Evaluation) -> str:
    """SVG: extra nats a token over the number of skipped layers."""
    return _plot(evaluation, lambda num_skipped: num_skipped, "skipped layers")


def speed_plot(evaluation: Evaluation) -> str:
    """SVG: extra nats a token over the measured speed-up of prefill."""
    speed_ups = {time.num_skipped: time.speed_up for time in evaluation.prefill}
    return _plot(evaluation, speed_ups.__getitem__, "speed-up of prefill, measured")


def render_evaluation(evaluation: Evaluation) -> str:
    """One self-contained HTML page."""
    parts = [
        Paragraph(introduce(_arm_names(evaluation))),
        *map(Paragraph, evaluation.notes),
        *_texts(evaluation),
        *_greedy(evaluation),
        *_retrieval(evaluation),
        *_prefill(evaluation),
        Heading("How this was made"),
        Table(("", ""), list(_settings(evaluation))),
    ]
    return render(f"What a shallow prompt costs {evaluation.settings.model}", parts)


def summarize(evaluation: Evaluation) -> list[str]:
    """The main figures, a line an arm and task."""
    lines = [
        f"{_arm(score.treatment, score.num_skipped)}: perplexity {written(score.perplexity, digits=2)}"
        + (f", recovered {written(score.recovered, 100, 1)} %" if score.recovered else "")
        for score in (_overall_scores(evaluation) if evaluation.texts else ())
    ]
    lines += [
        f"{_arm(score.treatment, score.num_skipped)}: greedy answers the same for {written(score.prefix, digits=1)} "
        f"of {score.mean_tokens:.1f} tokens"
        for score in evaluation.greedy
    ]
    lines += [
        f"{_arm(score.treatment, score.num_skipped)}: {written(score.right, 100, 1)} % of facts found"
        for score in evaluation.retrieval
        if score.right is not None
    ]
    return [*lines, *(f"note: {note}" for note in evaluation.notes)]


def written(interval: Interval | None, scale: float = 1.0, digits: int = 3) -> str:
    """The figure with its interval; a dash if there is none. A figure too long for its digits is in powers of ten."""
    if interval is None:
        return "-"
    value, low, high = (_number(number * scale, digits) for number in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def _number(value: float, digits: int) -> str:
    return f"{value:.2e}" if abs(value) >= 1e5 else f"{value:.{digits}f}"


# --- the tasks ------------------------------------------------------------------------------------------


def _texts(evaluation: Evaluation) -> Iterable[Part]:
    if not evaluation.texts:
        return
    settings = evaluation.settings
    yield Heading("How an author went on")
    yield Paragraph(
        f"Prompts of {settings.prompt_tokens} tokens and the {settings.continuation_tokens} that their authors wrote "
        "next. The first of those is read off the boundary token alone. Extra is how many nats a token less likely the "
        "continuation is than at full depth; divergence the Kullback-Leibler divergence of the next token's "
        "distribution from full depth's; agreement how often both have the same likeliest token; recovered the share "
        "of the paper's loss that calibration undoes, 1 - ln(calibrated / full) / ln(shallow / full) in perplexities. "
        + _INTERVALS
    )
    for kind in dict.fromkeys(score.kind for score in evaluation.texts):
        seen = [projector.num_skipped for projector in settings.projectors if kind in projector.kinds]
        yield from _text_tables(kind, [score for score in evaluation.texts if score.kind == kind])
        if seen:
            counts = ", ".join(map(str, seen))
            yield Paragraph(
                f"Beware: the projector that skips {counts} learnt from text of this kind, though from other works, "
                "which flatters it here."
            )
    yield Plot(loss_plot(evaluation), f"Extra nats a token by skipped layers. {_overall(evaluation)}")
    yield Plot(
        speed_plot(evaluation),
        f"The same by what skipping gains on this machine: one prompt of {settings.prompt_tokens} tokens until its "
        "first token can be chosen. Lower and further right is better.",
    )


def _text_tables(kind: str, scores: Sequence[TextScore]) -> Iterable[Part]:
    name = "All kinds together" if kind == ALL_KINDS else f"Kind: {kind}"
    few = "" if scores[0].num_passages >= MIN_UNITS else " Too few for their intervals."
    caption = f"{name}; {scores[0].num_passages} passages.{few}"
    arms = [_arm(score.treatment, score.num_skipped) for score in scores]
    perplexities = [
        [written(found, digits=2) for found in (score.perplexity, score.first_perplexity, score.rest_perplexity)]
        for score in scores
    ]
    recovered = [written(score.recovered, 100, 1) for score in scores]
    yield Table(
        ("", "perplexity", "of the first token", "of the others", "recovered (%)"),
        [(arm, *row, share) for arm, row, share in zip(arms, perplexities, recovered, strict=True)],
        caption,
    )
    losses = [(written(score.extra), written(score.divergence), written(score.agreement, 100, 1)) for score in scores]
    yield Table(
        ("", "extra (nats)", "divergence (nats)", "agreement (%)"),
        [(arm, *row) for arm, row in zip(arms, losses, strict=True)],
        caption,
    )


def _greedy(evaluation: Evaluation) -> Iterable[Part]:
    if not evaluation.greedy:
        return
    first = evaluation.greedy[0]
    yield Heading("The same answer, for how long")
    yield Paragraph(
        f"Full depth's greedy answers to {first.num_answers} prompts ({first.mean_tokens:.1f} tokens in the mean, at "
        f"most {evaluation.settings.greedy_tokens}), and how many of their tokens the others would have chosen, too, "
        "from the start to the first that differs. Full depth's own row is short of whole where two tokens are equally "
        f"likely to rounding. {_INTERVALS}"
    )
    rows = [
        (_arm(score.treatment, score.num_skipped), written(score.prefix, digits=1), written(score.whole, 100, 1))
        for score in evaluation.greedy
    ]
    yield Table(("", "tokens shared from the start", "whole answers shared (%)"), rows)


def _retrieval(evaluation: Evaluation) -> Iterable[Part]:
    if not evaluation.retrieval:
        return
    lengths = sorted({cell.length for cell in evaluation.retrieval[0].cells})
    counting = sum(cell.counts for cell in evaluation.retrieval[0].cells)
    yield Heading("A fact in the prompt")
    yield Paragraph(
        "Five facts stand in a prompt, one is asked for at its end. An answer is right if each of its tokens is the "
        f"likeliest. {counting} of {len(evaluation.retrieval[0].cells)} cells (a length and a depth) count: those "
        "where full depth is right at least half of the time on cases of another seed. The difference is in points, "
        f"paired case by case. By length, all cells are there. {_INTERVALS}"
    )
    rows = []
    for score in evaluation.retrieval:
        by_length = [[cell.right for cell in score.cells if cell.length == length] for length in lengths]
        means = [f"{100 * sum(rights) / len(rights):.0f}" for rights in by_length]
        arm = _arm(score.treatment, score.num_skipped)
        rows.append((arm, written(score.right, 100, 1), written(score.difference, 100, 1), *means))
    columns = ("", "right (%)", "difference", *(f"{length} tokens (%)" for length in lengths))
    yield Table(columns, rows, f"{evaluation.retrieval[0].num_cases} cases count.")


def _prefill(evaluation: Evaluation) -> Iterable[Part]:
    if not evaluation.prefill:
        return
    yield Heading("What skipping gains")
    rows = [
        (
            str(time.num_skipped),
            f"{1000 * time.median_s:.1f}",
            written(time.interval, digits=2) if time.interval else f"{time.speed_up:.2f}",
        )
        for time in evaluation.prefill
    ]
    yield Table(
        ("skipped layers", "prefill (ms)", "speed-up"),
        rows,
        f"One prompt of {evaluation.settings.prompt_tokens} tokens, medians of interleaved rounds, in one process: no "
        "queue, no hand-off. Intervals are over the rounds of this run; another run may lie outside. A calibrated "
        "projection has the shapes of the paper's, and takes as long.",
    )


def _settings(evaluation: Evaluation) -> Iterable[tuple[str, str]]:
    settings = evaluation.settings
    yield "model", settings.model
    yield "model digest", settings.model_digest
    yield "layers", str(settings.num_layers)
    for projector in settings.projectors:
        learnt_from = f", learnt from {', '.join(projector.kinds)}" if projector.kinds else ""
        yield f"projector that skips {projector.num_skipped}{learnt_from}", projector.digest
    for text in settings.texts:
        yield f"text: {text.kind}", text.digest
    yield "seed", str(settings.seed)
    kernels = f", {settings.kernels} kernels" if settings.kernels else ""
    yield "computed in", f"{settings.dtype} on {settings.device}{kernels}"


# --- helpers --------------------------------------------------------------------------------------------


def _plot(evaluation: Evaluation, x_of: Callable[[int], float], x_label: str) -> str:
    """Loss of what is served, beginning with full depth, which loses nothing."""
    scores = _overall_scores(evaluation)
    lines = []
    for treatment in (Treatment.SHALLOW, CALIBRATED):
        own = sorted((score for score in scores if score.treatment == treatment), key=lambda score: score.num_skipped)
        if own:
            lines.append(
                Line(
                    str(treatment),
                    [x_of(0), *(x_of(score.num_skipped) for score in own)],
                    [0.0, *(score.extra.value for score in own)],
                    [0.0, *((score.extra.high - score.extra.low) / 2 for score in own)],
                )
            )
    return line_plot(lines, x_label=x_label, y_label="extra nats a token")


def _overall_scores(evaluation: Evaluation) -> list[TextScore]:
    """Of all kinds together, or of the only one."""
    last = evaluation.texts[-1].kind
    return [score for score in evaluation.texts if score.kind == last]


def _overall(evaluation: Evaluation) -> str:
    first = _overall_scores(evaluation)[0]
    of = "all kinds together" if first.kind == ALL_KINDS else first.kind
    return f"Of {of}, {first.num_passages} passages; bands are 95 % intervals."


def _arm_names(evaluation: Evaluation) -> set[str]:
    tasks = (evaluation.texts, evaluation.greedy, evaluation.retrieval)
    return {score.treatment for scores in tasks for score in scores}


def _arm(treatment: str, num_skipped: int) -> str:
    return f"{treatment}, {num_skipped} skipped" if num_skipped else treatment
