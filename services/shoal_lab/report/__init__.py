"""What measurements are read on: a page of HTML that needs no other file, and its plots. Plots want matplotlib."""

from __future__ import annotations

from importlib.util import find_spec

from shoal.errors import ConfigError


def require_packages(what: str, extra: str, *names: str) -> None:
    """Before anything is imported that needs them. Raises ConfigError that names the ``extra`` that has them."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{what} needs {' and '.join(missing)}: pip install '.[serve,{extra}]' in Shoal's repository")
