"""How fast an OpenAI endpoint answers, and how much it bears: open and closed loops, percentiles, goodput."""

from __future__ import annotations

from importlib.util import find_spec

from shoal.errors import ConfigError


def require_packages() -> None:
    """Before anything of this package is imported that needs them. Raises ConfigError."""
    missing = [name for name in ("aiohttp", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"shoal bench needs {' and '.join(missing)}: pip install '.[serve,bench]' in its repository")
