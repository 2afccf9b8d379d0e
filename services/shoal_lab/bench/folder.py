"""The folder of a run's results: whether they can be written is known before the load."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from shoal.errors import ConfigError


def make_folder(path: Path, names: Iterable[str] = ()) -> None:
    """Without the files ``names``, which this run may write: another run's aren't taken for its own, should it be
    stopped or fail. Raises ConfigError.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        for name in names:
            (path / name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} can't be written to ({error.strerror}): choose another --output") from error
