"""What pools of a given size would bear, by measured or assumed step costs: the scheduler is real, time is not."""

from __future__ import annotations

from importlib.util import find_spec

from shoal.errors import ConfigError


def require_packages() -> None:
    """Before anything of this package is imported that needs them. Raises ConfigError."""
    if find_spec("matplotlib") is None:
        raise ConfigError("shoal simulate needs matplotlib: pip install '.[serve,bench]' in its repository")
