"""What shallow prompts and int8 weights cost, from the figures that ``shoal eval`` wrote and docs/quality.md shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FIGURES = Path(__file__).parents[2] / "docs" / "figures"


def quality_rows(model_digest: str, projector_digest: str | None, num_skipped: int) -> list[dict[str, Any]]:
    """A row for each evaluation of the model with what is served, which is the projector or (``None``) the paper's.

    Beside full depth on the same passages. ``treatment`` is as in the evaluation.
    """
    served = "shallow" if projector_digest is None else "calibrated"
    wanted = {(served, num_skipped), (f"{served}, all int8", num_skipped), ("full, int8", 0)}
    rows = []
    for path in sorted(_FIGURES.glob("evaluation-*.json")):
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        settings = evaluation["settings"]
        if settings["model_digest"] != model_digest:
            continue
        if projector_digest not in {None, *(projector["digest"] for projector in settings["projectors"])}:
            continue
        full = {text["kind"]: text for text in evaluation["texts"] if text["treatment"] == "full"}
        rows += [
            {
                "text": text["kind"],
                "passages": settings["num_passages"],
                "treatment": text["treatment"],
                "dtype": settings["dtype"],
                "full_perplexity": full[text["kind"]]["perplexity"]["value"],
                "perplexity": text["perplexity"]["value"],
                "divergence": text["divergence"]["value"],
                "agreement": text["agreement"]["value"],
                "source": f"docs/figures/{path.name}",
            }
            for text in evaluation["texts"]
            if (text["treatment"], text["num_skipped"]) in wanted
        ]
    return rows
