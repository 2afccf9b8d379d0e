"""The commands of this package, from what was typed to what is printed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from shoal.engine.build import choose_dtype
from shoal.errors import ConfigError
from shoal.model.files import locate
from shoal.quality.analysis import Analysis, AnalysisOptions, Progress, analyze

if TYPE_CHECKING:
    from shoal.config import Dtype


def run_analyze(
    model: str, on_progress: Progress, *, output: Path, dtype: str, candidates: str | None, **options: Any
) -> str:
    """Write analysis.json, report.html and importance.svg to ``output``; what to tell the user. Raises ShoalError."""
    require_plots()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = parse_counts(candidates) if candidates else ()
    asked = AnalysisOptions(
        output=output, device=device, dtype=choose_dtype(cast("Dtype", dtype), device), candidates=counts, **options
    )
    found = analyze(locate(model), asked, on_progress)
    on_progress("", 0, 0)
    _write(found, output)
    lines = [
        f"skip {item.num_skipped:>3}: predicted {item.predicted_loss:.4f}, "
        f"measured {item.measured.divergence.mean:.4f} ± {item.measured.divergence.standard_error:.4f} nats a token"
        for item in found.candidates
    ]
    return "\n".join(
        [
            *lines,
            f"recommended: --skip-layers {found.recommended_skip_layers} (at most {found.max_loss:g} nats a token)",
            f"report: {output / 'report.html'}",
        ]
    )


def require_plots() -> None:
    """Before hours are spent on a report that can't be drawn. Raises ConfigError."""
    if find_spec("matplotlib") is None:
        raise ConfigError("reports need matplotlib: pip install '.[serve,quality]' in Shoal's repository")


def parse_counts(text: str) -> tuple[int, ...]:
    """Numbers with commas between them. Raises ConfigError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"candidates are {text!r}: write numbers with commas between them, like 4,8,10") from None


def _write(found: Analysis, output: Path) -> None:
    from shoal.quality.analysis_page import importance_plot, render_analysis

    (output / "analysis.json").write_text(found.to_json(), encoding="utf-8")
    (output / "importance.svg").write_text(importance_plot(found) + "\n", encoding="utf-8")
    (output / "report.html").write_text(render_analysis(found), encoding="utf-8")
