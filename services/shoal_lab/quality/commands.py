"""The commands of this package, from what was typed to what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from shoal.engine.build import choose_dtype
from shoal.errors import ConfigError
from shoal.model.files import ModelFiles, locate
from shoal.model.plan import LayerPlan
from shoal.model.projector import ProjectorHeader, projector_beside, save_projector
from shoal_lab.quality.analysis import Analysis, AnalysisOptions, Progress, analyze
from shoal_lab.quality.calibration import CalibrationOptions, Calibrator
from shoal_lab.quality.evaluation import Evaluation, evaluate
from shoal_lab.quality.evaluation_options import EvaluationOptions, Task
from shoal_lab.quality.limits import MIN_PASSAGES
from shoal_lab.quality.subject import Subject
from shoal_lab.quality.texts import Kind, Passage, Split, Text, load, opening, passages, read
from shoal_lab.report import require_packages
from shoal_lab.report.folder import output_folder

if TYPE_CHECKING:
    from shoal.config import Dtype

_Name = TypeVar("_Name", Kind, Task)
# Prompt and continuation of a passage, as quality is measured on them, too.
PASSAGE_TOKENS = (512, 128)


def run_analyze(
    model: str, on_progress: Progress, *, output: Path, dtype: str, candidates: str | None, **options: Any
) -> str:
    """Write analysis.json, report.html and importance.svg to ``output``; what to tell the user. Raises ShoalError."""
    require_packages("a report", "quality", "matplotlib")  # before hours are spent on it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = parse_counts(candidates, "--candidates") if candidates else ()
    asked = AnalysisOptions(
        device=device, dtype=choose_dtype(cast("Dtype", dtype), device), candidates=counts, **options
    )
    with output_folder(output):
        found = analyze(locate(model), asked, on_progress)
        on_progress("", 0, 0)
        _write(found, output)
    lines = [
        f"skip {item.num_skipped:>3}: predicted {item.predicted_loss:.4f}, "
        f"measured {item.measured.divergence.mean:.4f} ± {item.measured.divergence.standard_error:.4f} nats a token"
        for item in found.candidates
    ]
    lines += [
        f"recommended: --skip-layers {found.recommended_skip_layers} (at most {found.max_loss:g} nats a token)",
        f"report: {output / 'report.html'}",
    ]
    return "\n".join(lines)


def run_eval(
    model: str,
    on_progress: Progress,
    *,
    output: Path,
    dtype: str,
    skip_layers: str | None,
    boundary_tokens: str | None,
    tasks: str,
    kinds: str | None,
    **options: Any,
) -> str:
    """Write evaluation.json and report.html to ``output``; what to tell the user. Raises ShoalError."""
    require_packages("a report", "quality", "matplotlib")  # before hours are spent on it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = EvaluationOptions(
        device=device,
        dtype=choose_dtype(cast("Dtype", dtype), device),
        skip_layers=parse_counts(skip_layers, "--skip-layers") if skip_layers else (),
        boundary_tokens=parse_counts(boundary_tokens, "--boundary-tokens") if boundary_tokens else (),
        tasks=parse_tasks(tasks),
        kinds=parse_kinds(kinds),
        **options,
    )
    with output_folder(output):
        found = evaluate(locate(model), asked, on_progress)
        on_progress("", 0, 0)
        return _write_evaluation(found, output)


def run_calibrate(
    model: str,
    on_progress: Progress,
    *,
    output: Path | None,
    data: Sequence[Path],
    kinds: str | None,
    num_passages: int,
    dtype: str,
    options: CalibrationOptions,
) -> str:
    """Write a projector; what to tell the user. Raises ShoalError."""
    files = locate(model)
    plan = _plan_to_calibrate(files.spec().num_layers, options.num_skipped)
    if num_passages < MIN_PASSAGES:
        raise ConfigError(f"--passages is {num_passages}, and {MIN_PASSAGES} of each text are the least: raise it")
    path = output or _beside(files, plan)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file with --output")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose_dtype(cast("Dtype", dtype), device)
    with output_folder(path.parent):
        tokenizer = files.tokenizer()
        texts = _texts(data, kinds, tokenizer)
        cut = [passage for text in texts for passage in _passages(text, tokenizer, num_passages)]
        loading = partial(on_progress, "loading")
        subject = Subject.load(files, dtype=chosen, max_tokens=sum(PASSAGE_TOKENS), device=device, on_progress=loading)
        found = Calibrator(subject, options, on_progress).run(cut)
        header = ProjectorHeader(
            model_digest=files.digest,
            num_layers=plan.num_layers,
            num_kept=plan.num_kept,
            data_digest=sha256("".join(text.digest for text in texts).encode()).hexdigest(),
            settings={
                **asdict(options), "ridge": found.ridge, "texts": [text.kind for text in texts],
                "num_passages": len(cut), "dtype": str(chosen).removeprefix("torch."),
            },
            scores=found.scores,
            num_sinks=options.num_apart,
        )  # fmt: skip
        save_projector(path, header, found.weight.to(torch.bfloat16).cpu())
    on_progress("", 0, 0)
    lines = [f"{name:>8}: {score:.4f} nats a token from full depth" for name, score in found.scores.items()]
    return "\n".join([f"on held-out passages of {', '.join(text.kind for text in texts)}:", *lines, f"written: {path}"])


def _texts(data: Sequence[Path], kinds: str | None, tokenizer: Any) -> list[Text]:
    """Users' own, else of what ships the calibration split of ``kinds``. Raises DataError or ConfigError."""
    if data:
        return [read(path, tokenizer) for path in data]
    return [load(kind, Split.CALIBRATION) for kind in parse_kinds(kinds)]


def _passages(text: Text, tokenizer: Any, limit: int) -> list[Passage]:
    num_prompt, num_continuation = PASSAGE_TOKENS
    return passages(
        text.kind, text.token_ids(tokenizer), num_prompt=num_prompt, num_continuation=num_continuation, limit=limit,
        at_least=MIN_PASSAGES, opening=opening(tokenizer),
    )  # fmt: skip


def _plan_to_calibrate(num_layers: int, num_skipped: int) -> LayerPlan:
    """Raises ConfigError that names the range: with one skipped layer nothing is lost, so nothing can be learnt."""
    if num_layers < 3:
        raise ConfigError(f"this model has {num_layers} layers: calibration needs 3, of which 2 can be skipped")
    if not 2 <= num_skipped < num_layers:
        raise ConfigError(
            f"--skip-layers is {num_skipped}, this model has {num_layers} layers: choose 2 to {num_layers - 1}"
        )
    return LayerPlan(num_layers, num_skipped)


def _beside(files: ModelFiles, plan: LayerPlan) -> Path:
    """Beside the model, where it is found without being named; a package's folder isn't the user's to write to."""
    path = projector_beside(files, plan)
    return Path(path.name) if files.is_packaged else path


def parse_kinds(text: str | None) -> tuple[Kind, ...]:
    """Names with commas between them, each once; all kinds if there are none. Raises ConfigError."""
    return _parse_names(text, Kind, "--kinds") if text else tuple(Kind)


def parse_tasks(text: str) -> tuple[Task, ...]:
    """Names with commas between them, each once. Raises ConfigError."""
    return _parse_names(text, Task, "--tasks")


def _parse_names(text: str, of: type[_Name], option: str) -> tuple[_Name, ...]:
    try:
        return tuple(dict.fromkeys(of(part.strip()) for part in text.split(",")))
    except ValueError as error:
        raise ConfigError(f"{error}: {option} are some of {', '.join(of)}") from None


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """Numbers with commas between them. Raises ConfigError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} is {text!r}: write numbers with commas between them, like 4,8,10") from None


def _write(found: Analysis, output: Path) -> None:
    from shoal_lab.quality.analysis_page import importance_plot, render_analysis

    (output / "analysis.json").write_text(found.to_json(), encoding="utf-8")
    (output / "importance.svg").write_text(importance_plot(found) + "\n", encoding="utf-8")
    (output / "report.html").write_text(render_analysis(found), encoding="utf-8")


def _write_evaluation(found: Evaluation, output: Path) -> str:
    from shoal_lab.quality.evaluation_page import render_evaluation, summarize

    (output / "evaluation.json").write_text(found.to_json(), encoding="utf-8")
    (output / "report.html").write_text(render_evaluation(found), encoding="utf-8")
    return "\n".join([*summarize(found), f"report: {output / 'report.html'}"])
