"""What a reader of an evaluation has to know besides its figures: what was compared, and what says too little."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from shoal_lab.quality.arms import CALIBRATED
from shoal_lab.quality.greedy_scores import GreedyScore
from shoal_lab.quality.limits import MIN_UNITS
from shoal_lab.quality.retrieval_scores import RetrievalScore
from shoal_lab.quality.subject import Treatment
from shoal_lab.quality.text_scores import ALL_KINDS, TextScore

_BOUNDARY, _INT8 = " boundary", "int8"
_SPEED = (
    "SPEED, which is for models that are tuned for it (speed: of the prompt the skipped layers hold the first token's "
    "K/V alone)"
)
_CONTROLS = {
    Treatment.NO_PROJECTION: "no_projection (the skipped layers hold no K/V of the prompt)",
    Treatment.NO_BOUNDARY: "no_boundary (the last prompt token is shallow, too)",
    Treatment.REMOVED: "removed (the layers are missing for all tokens)",
}


def introduce(names: Collection[str]) -> str:
    """What is compared, by the names of the arms that were run, and nothing else."""
    numbers = sorted({int(name.split()[-2]) for name in names if name.endswith(_BOUNDARY)})
    parts = ["full depth", "a shallow prompt with the paper's K/V projection"]
    if CALIBRATED in names:
        parts.append("one with a calibrated projection")
    if numbers:
        parts.append(
            f"the same with {', '.join(map(str, numbers))} full-depth tokens at the prompt's end instead of one"
        )
    if any(name.endswith(_INT8) for name in names):
        parts.append("full depth and what is served with decode's weights in int8, and (all int8) prefill's, too")
    if Treatment.SPEED in names:
        parts.append(_SPEED)
    told = "What the last layers of a prompt are worth: " + ", ".join(parts)
    controls = [said for treatment, said in _CONTROLS.items() if treatment in names]
    return told + (f", and controls, each without a part of the method: {', '.join(controls)}." if controls else ".")


def notes_on(
    texts: Sequence[TextScore], greedy: Sequence[GreedyScore], retrieval: Sequence[RetrievalScore]
) -> tuple[str, ...]:
    """Sentences; none if all is well. Units count within what they are resampled in: a kind of text, a cell."""
    counts = {f"{score.kind} passages": score.num_passages for score in texts if score.kind != ALL_KINDS}
    if greedy:
        counts["greedy answers"] = greedy[0].num_answers
    if retrieval:
        counts["retrieval cases a cell"] = min(cell.num_cases for cell in retrieval[0].cells)
    few = [f"{number} {name}" for name, number in counts.items() if number < MIN_UNITS]
    notes = []
    if few:
        notes.append(
            f"Too few for an interval: {', '.join(few)}. Intervals over fewer than {MIN_UNITS} are too narrow (over "
            "5, 82 of 100 hold the true figure, not 95), and no share recovered is told: ask for more --passages or "
            "--cases."
        )
    if retrieval and not retrieval[0].num_cases:
        notes.append(
            "Retrieval tells nothing: in no cell (a length and a depth) does full depth find the fact at least half of "
            "the time."
        )
    return tuple(notes)
