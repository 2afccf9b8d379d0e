"""Folders for results: writable before hours of work, and gone again if nothing came of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal.errors import ConfigError


@contextmanager
def output_folder(folder: Path, names: Iterable[str] = ()) -> Iterator[None]:
    """Makes ``folder`` and those above it; of what it has made, it removes at the end what is still empty.

    Files ``names``, which this run may write, go: another run's aren't taken for its own, should it be stopped or fail.
    Raises ConfigError if nothing can be written there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            for name in names:
                (folder / name).unlink(missing_ok=True)
        except OSError as error:
            told = f"nothing can be written to {folder} ({error.strerror}): choose another --output"
            raise ConfigError(told) from error
        yield
    finally:
        for path in made:  # the innermost first
            with suppress(OSError):
                path.rmdir()
