"""The tables of docs/quality.md show what docs/figures/*.json holds, to the last digit that they show."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[4] / "docs"
TEXT = (DOCS / "quality.md").read_text(encoding="utf-8")
ROWS = {
    "speed, untuned, the first token as anchor": "speed",
    "control: no projection": "no_projection",
    "control: no boundary token": "no_boundary",
    "control: removed at every stage": "removed",
}
KINDS = {kind: (f"evaluation-{kind}", 10) for kind in ("prose", "dialogue", "technical", "code")} | {
    "Gemma-3-270M, technical": ("evaluation-gemma", 6)
}
OF_TEXT = ("perplexity", "first_perplexity", "rest_perplexity", "divergence", "agreement", "recovered")


def figures(name: str) -> Any:
    return json.loads((DOCS / "figures" / f"{name}.json").read_text(encoding="utf-8"))


def table(after: str) -> list[list[str]]:
    """The cells of the first table behind ``after``, without its head."""
    assert TEXT.count(after) == 1, after
    found = re.search(r"^(?:\|.*\n)+", TEXT[TEXT.index(after) :], re.MULTILINE)
    assert found
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()[2:]]


def treatment(label: str) -> str:
    plain = label.replace("full depth", "full").replace("shallow (the paper's)", "shallow").replace(" tokens", "")
    return ROWS.get(label, plain)


def shows(cell: str, figure: Any, scale: float = 1.0) -> None:
    """``cell`` shows ``figure``, a number or an interval, of which its ends may be left out."""
    parts = [figure[name] for name in ("value", "low", "high")] if isinstance(figure, dict) else [figure]
    numbers = re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?", cell)
    assert len(numbers) in (1, len(parts)), cell
    for said, part in zip(numbers, parts, strict=False):
        step = 10.0 ** -len(said.partition(".")[2])
        coarse = 0.01 * abs(part * scale) if abs(part * scale) >= 1e5 else 0.0
        assert float(said.replace(",", "")) == pytest.approx(part * scale, abs=max(0.5001 * step, coarse)), (cell, part)


def scores(name: str, num_skipped: int | None = None) -> dict[str, Any]:
    """By treatment, of one number of skipped layers besides full depth."""
    return {one["treatment"]: one for one in figures(name)["texts"] if one["num_skipped"] in (0, num_skipped)}


def row_of_text(cells: Sequence[str], score: dict[str, Any], names: Sequence[str]) -> None:
    for cell, name in zip(cells, names, strict=True):
        if score[name] is None or not cell:
            assert not cell or score[name]
            continue
        shows(cell, score[name], 100 if name in ("agreement", "recovered") else 1)


def test_each_kind_s_line():
    rows = table("## By kind of text")
    files = {f"[{kind}](figures/{name}.json)": (name, num_skipped) for kind, (name, num_skipped) in KINDS.items()}
    assert [row[0] for row in rows] == list(files)
    for kind, full, shallow, calibrated, recovered, lost, left in rows:
        found = scores(*files[kind])
        for cell, name in ((full, "full"), (shallow, "shallow"), (calibrated, "calibrated")):
            shows(cell, found[name]["perplexity"])
        shows(recovered, found["calibrated"]["recovered"], 100)
        shows(lost, found["shallow"]["divergence"])
        shows(left, found["calibrated"]["divergence"])


def test_loss_by_skipped_layers():
    speed_ups = {time["num_skipped"]: time["speed_up"] for time in figures("evaluation-depths")["prefill"]}
    rows = table("## By number of skipped layers")
    assert rows[0][0] == "[0](figures/evaluation-depths.json)"
    for first, speed_up, *cells in rows:
        count = first.strip("[").partition("]")[0]
        found = scores("evaluation-depths", int(count))
        shows(speed_up, speed_ups[int(count)])
        row_of_text(cells[:2], found["full" if count == "0" else "shallow"], ("perplexity", "extra"))
        if "calibrated" in found and count != "0":
            row_of_text(cells[2:], found["calibrated"], ("perplexity", "extra", "recovered"))
        else:
            assert cells[2:] == [""] * 3


@pytest.mark.parametrize(
    ("after", "name", "num_skipped", "columns"),
    [
        ("## Treatments side by side", "evaluation-technical", 10, OF_TEXT),
        ("## Weights in int8", "evaluation-int8", 10, ("perplexity", "extra", "divergence", "agreement")),
    ],
)
def test_all_that_was_compared(after: str, name: str, num_skipped: int, columns: tuple[str, ...]):
    found = scores(name, num_skipped)
    rows = table(after)
    assert {treatment(row[0]) for row in rows} == set(found)
    for label, *cells in rows:
        row_of_text(cells, found[treatment(label)], columns)


def test_retrieval():
    found = {one["treatment"]: one for one in figures("evaluation-retrieval")["retrieval"]}
    for label, right, difference in table("## Retrieval"):
        shows(right, found[treatment(label)]["right"], 100)
        if difference:
            shows(difference, found[treatment(label)]["difference"], 100)


def test_what_the_gates_predict_and_what_is_lost():
    found = {one["num_skipped"]: one for one in figures("analysis")["candidates"]}
    rows = table("## Which layers a prompt needs")
    assert [int(row[0]) for row in rows] == list(found)
    for count, predicted, divergence, extra in rows:
        one = found[int(count)]
        shows(predicted, one["predicted_loss"])
        for cell, name in ((divergence, "divergence"), (extra, "extra")):
            for said, part in zip(cell.split(" ± "), ("mean", "standard_error"), strict=True):
                shows(said, one["measured"][name][part])


def test_what_the_text_says_of_them():
    shipped = scores("evaluation-technical-shipped", 10)["calibrated"]["recovered"]
    [cell] = re.findall(r"\[(80\.4\]\(figures/evaluation-technical-shipped\.json\) \[.*?\]) %", TEXT)
    shows(re.sub(r"\]\(.*?\)", "", cell), shipped, 100)
    extra = {count: scores("evaluation-depths", count) for count in (6, 9, 10)}
    assert extra[9]["calibrated"]["extra"]["value"] < extra[6]["shallow"]["extra"]["value"] / 2
    assert extra[9]["shallow"]["extra"]["value"] > extra[10]["shallow"]["extra"]["value"]


def test_answers():
    found = {one["treatment"]: one for one in figures("evaluation-answers")["greedy"]}
    rows = table("## Answers")
    assert {treatment(row[0]) for row in rows} == set(found)
    for label, shared in rows:
        shows(shared, found[treatment(label)]["prefix"])


def test_a_server_s_answers():
    found = figures("lm-eval")["results"]
    names = {
        "full depth": "full depth",
        "shallow, calibrated": "shallow, the shipped projector",
        "shallow (the paper's)": "shallow, the paper's projection",
    }
    rows = table("± one standard error:")
    assert [row[0] for row in rows] == list(names)
    for label, right in rows:
        told, error = right.split(" ± ")
        shows(told, found[names[label]]["capitals"]["exact_match,none"], 100)
        shows(error, found[names[label]]["capitals"]["exact_match_stderr,none"], 100)
