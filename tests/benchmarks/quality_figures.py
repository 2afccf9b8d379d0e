"""What a shallow prompt costs, from the figures that ``shoal eval`` wrote and docs/quality.md shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FIGURES = Path(__file__).parents[2] / "docs" / "figures"


def quality_rows(model_digest: str, num_skipped: int, *, is_calibrated: bool) -> list[dict[str, Any]]:
    """A row for each kind of text that one model was evaluated on with so many layers skipped, beside full depth."""
    treatment = "calibrated" if is_calibrated else "shallow"
    rows = []
    for path in sorted(_FIGURES.glob("evaluation-*.json")):
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        if evaluation["settings"]["model_digest"] != model_digest:
            continue
        full = {text["kind"]: text for text in evaluation["texts"] if text["treatment"] == "full"}
        rows += [
            {
                "text": text["kind"],
                "treatment": treatment,
                "full_perplexity": full[text["kind"]]["perplexity"]["value"],
                "shallow_perplexity": text["perplexity"]["value"],
                "divergence": text["divergence"]["value"],
                "agreement": text["agreement"]["value"],
                "source": f"docs/figures/{path.name}",
            }
            for text in evaluation["texts"]
            if text["treatment"] == treatment and text["num_skipped"] == num_skipped
        ]
    return rows
