"""The samples of an analysis, written down as they come, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import TypeAdapter, ValidationError

from shoal.errors import ConfigError
from shoal_lab.quality.importance import GateGradients


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """All that a sample depends on, besides its index. ``data`` is the digest of the prompts."""

    model: str
    model_digest: str
    data: str
    seed: int
    response_tokens: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A response, and what it says to the gates; ``gradients`` is ``None`` for one that is held out."""

    index: int
    response: tuple[int, ...]
    gradients: GateGradients | None


_SAMPLE = TypeAdapter(Sample)


class SampleLog:
    """A file of JSON lines: the settings, then a sample each. A context manager that holds it open for appending."""

    def __init__(self, path: Path, settings: SampleSettings) -> None:
        """Raises ConfigError if the file is of other settings, or damaged other than by a stop in mid-line."""
        self._path = path
        self._samples: dict[tuple[int, bool], Sample] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise ConfigError(f"{path} can't be written ({error.strerror}): choose another --output") from error
        whole, newline, _ = path.read_bytes().rpartition(b"\n")
        lines = whole.split(b"\n") if newline else []
        if lines:
            self._check(lines[0], settings)
        for number, line in enumerate(lines[1:], start=2):
            try:
                self._keep(_SAMPLE.validate_json(line))
            except ValidationError as error:
                raise ConfigError(f"{path}, line {number} is damaged: remove the file, and begin anew") from error
        self._file = path.open("r+b")
        self._file.seek(len(whole) + len(newline))
        self._file.truncate()
        if not lines:
            self._write(json.dumps(asdict(settings)).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def get_or_add(self, index: int, make: Callable[[int], Sample], *, is_held_out: bool) -> Sample:
        """The sample as it was written, else as ``make(index)`` gives it, which is written down before it's used."""
        found = self._samples.get((index, is_held_out))
        if found is None:
            found = make(index)
            self._keep(found)
            self._write(_SAMPLE.dump_json(found))
        return found

    def _keep(self, sample: Sample) -> None:
        self._samples[sample.index, sample.gradients is None] = sample

    def _write(self, line: bytes) -> None:
        self._file.write(line + b"\n")
        self._file.flush()

    def _check(self, line: bytes, settings: SampleSettings) -> None:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        wanted = asdict(settings)
        if not isinstance(found, dict):
            raise ConfigError(f"{self._path} is no file of samples: choose another --output")
        changed = [
            f"{key} {found.get(key)!r}, not {value!r}" for key, value in wanted.items() if found.get(key) != value
        ]
        if changed:
            raise ConfigError(
                f"{self._path} holds samples of another run ({'; '.join(changed)}): choose another --output, "
                "repeat that run's options, or remove the file"
            )
