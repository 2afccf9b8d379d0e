"""Shoal serves language models with a shallow prefill pool and a deep decode pool.

Importing this package loads nothing heavy: torch, Ray and FastAPI come with the modules that need them.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("shoal")
except PackageNotFoundError:  # run from a source tree that isn't installed
    __version__ = "0.0.0"

__all__ = ["__version__"]
