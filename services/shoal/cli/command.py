"""The entry point ``shoal``: the command line, or a word to those who have installed the client alone."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    if find_spec("typer") is None:
        sys.exit("error: only Shoal's client is installed here; to serve: pip install '.[serve]' in its repository")
    from shoal.cli import main as run

    run()
