"""A calibrated K/V projection on disk: what ``shoal calibrate`` writes, and both pools load.

One safetensors file. Its ``weight`` ``[S * 2 * kv_size, hidden]`` takes the place of the paper's folded matrix
(model/projection.py): it maps ``n(h)``, the state that left the last kept layer without its scale, onto
``k_proj|v_proj`` of every skipped layer, before bias, k_norm and RoPE. The header says which model and plan it was
made for, and from what; a file that doesn't fit is refused before anything starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shoal.errors import ConfigError, ModelError, ProjectorMismatch
from shoal.model.files import ModelFiles, ModelKind
from shoal.model.plan import LayerPlan

PAPER = "paper"
_FORMAT = 2
_FORMATS_READ = (1, 2)  # in the first, all tokens have the learnt matrix: num_sinks is 0
_KEY = "shoal_projector"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SHIPPED = Path(__file__).parents[1] / "data" / "projectors"


@dataclass(frozen=True, slots=True)
class ProjectorHeader:
    """What a projector was made for (``model_digest``, ``num_layers``, ``num_kept``) and from (the rest).

    The first ``num_sinks`` positions of a prompt are not its: they keep the paper's projection.
    ``scores`` are figures of held-out calibration text, by name; ``settings`` what the calibration was told.
    """

    model_digest: str
    num_layers: int
    num_kept: int
    data_digest: str
    settings: Mapping[str, Any]
    scores: Mapping[str, float]
    num_sinks: int = 0

    @property
    def num_skipped(self) -> int:
        return self.num_layers - self.num_kept

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of text that it learnt from."""
        return tuple(self.settings.get("texts", ()))

    def require_model(self, path: Path, files: ModelFiles) -> None:
        """Raises ProjectorMismatch if it's for other weights; it's the first thing to say, whatever else differs."""
        if self.model_digest != files.digest:
            raise ProjectorMismatch(
                f"{path} was made for another model than {files.path}, one of {self.num_layers} layers, of which it "
                f"skips {self.num_skipped}: calibrate again"
            )

    def require_fit(self, path: Path, files: ModelFiles, plan: LayerPlan) -> None:
        """Raises ProjectorMismatch that says what differs."""
        self.require_model(path, files)
        if (self.num_layers, self.num_kept) != (plan.num_layers, plan.num_kept):
            raise ProjectorMismatch(
                f"{path} keeps {self.num_kept} of {self.num_layers} layers, this plan {plan.num_kept} of "
                f"{plan.num_layers}: say --skip-layers {self.num_skipped}, or calibrate again"
            )


@dataclass(frozen=True, slots=True)
class Projector:
    """A projector in memory. ``digest`` is SHA-256 (hex) of its file: a part of the plan hash."""

    header: ProjectorHeader
    weight: torch.Tensor
    digest: str


def save_projector(path: Path, header: ProjectorHeader, weight: torch.Tensor) -> None:
    """Write a file; a reader never sees half of it. Who may read it is the umask's to say: safetensors' own files are
    their owner's alone, and the pools may run as somebody else."""
    from safetensors.torch import save

    part = path.with_name(path.name + ".part")
    said = json.dumps({"format": _FORMAT, **asdict(header)}, sort_keys=True)
    try:
        part.write_bytes(save({"weight": weight.contiguous()}, metadata={_KEY: said}))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_header(path: Path) -> ProjectorHeader:
    """What a file says that it is for, without its matrix. Raises ModelError."""
    with _opened(path) as (header, _):
        return header


def load_projector(path: Path, files: ModelFiles, plan: LayerPlan) -> Projector:
    """Read a projector and hold it against model and plan. Raises ModelError."""
    with _opened(path) as (header, file):
        header.require_fit(path, files, plan)
        weight = file.get_tensor("weight")
    if weight.dtype not in _DTYPES or weight.dim() != 2:
        raise ModelError(
            f"{path} holds no matrix of real numbers, but {weight.dtype} {tuple(weight.shape)}: calibrate again"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"{path} holds numbers that aren't finite: calibrate again")
    return Projector(header, weight, hashlib.sha256(path.read_bytes()).hexdigest())


def require_model(wanted: str, files: ModelFiles) -> None:
    """Before a plan is made: the file at the path ``wanted``, if it's one, is of this model. Raises ModelError."""
    if wanted not in {PAPER, "auto"}:
        path = Path(wanted).expanduser()
        read_header(path).require_model(path, files)


def find_projector(wanted: str, files: ModelFiles, plan: LayerPlan) -> Projector | None:
    """``wanted`` is a path, ``paper`` for the paper's own projection, or ``auto``: the one beside the model, if any.

    A SPEED plan wants none: with a path, ConfigError.
    """
    if wanted not in {PAPER, "auto"} and plan.anchors is not None:
        raise ConfigError("a SPEED plan projects nothing: leave out --projector (model.projector), or the plan")
    if wanted == PAPER or not plan.projects:
        return None
    if wanted != "auto":
        return load_projector(Path(wanted).expanduser(), files, plan)
    path = projector_beside(files, plan)
    return load_projector(path, files, plan) if path.is_file() else None


def projector_beside(files: ModelFiles, plan: LayerPlan) -> Path:
    """Where a model's projector is looked for, and ``shoal calibrate`` puts it unless told otherwise."""
    name = f"projector-{plan.num_skipped}.safetensors"
    if files.is_packaged:
        return _SHIPPED / f"{files.model_id}-{name}"
    return files.path.with_name(f"{files.path.stem}.{name}") if files.kind is ModelKind.GGUF else files.path / name


@contextmanager
def _opened(path: Path) -> Iterator[tuple[ProjectorHeader, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield _header(path, (file.metadata() or {}).get(_KEY)), file
    except FileNotFoundError as error:
        raise ModelError(f"there is no projector {path}: make it with shoal calibrate") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is no projector that can be read ({error}): calibrate again") from error


def _header(path: Path, said: str | None) -> ProjectorHeader:
    try:
        tree = json.loads(said or "")
        if tree.pop("format") not in _FORMATS_READ:
            raise ModelError(f"{path} has a format that this release doesn't know: calibrate again")
        header = ProjectorHeader(**tree)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is no projector: make one with shoal calibrate") from error
    damaged = [name for name, is_sound in _sound(header) if not is_sound]
    if damaged:
        raise ModelError(f"{path} has a damaged header ({', '.join(damaged)}): calibrate again")
    return header


def _sound(header: ProjectorHeader) -> Iterator[tuple[str, bool]]:
    """Of each field whether it holds what it should: a file is data from outside."""
    settings, scores = header.settings, header.scores
    yield "model_digest", isinstance(header.model_digest, str)
    yield "data_digest", isinstance(header.data_digest, str)
    counts = header.num_kept, header.num_layers
    are_counts = all(type(count) is int for count in counts)
    yield "num_kept, num_layers", are_counts and 0 < counts[0] <= counts[1]
    yield "num_sinks", type(header.num_sinks) is int and header.num_sinks >= 0
    texts = settings.get("texts", []) if isinstance(settings, dict) else None
    yield "settings", isinstance(texts, list) and all(isinstance(kind, str) for kind in texts)
    yield "scores", isinstance(scores, dict) and all(type(score) in (int, float) for score in scores.values())
