"""The real texts that tests run on: prompts to be continued, and passages to measure perplexity with."""

from __future__ import annotations

import json
from pathlib import Path

_HERE = Path(__file__).parent


def prompts() -> dict[str, str]:
    """Twenty prompts of 20 to 1,500 SmolLM2 tokens by name, shortest kinds first. Four are over 1,000 tokens."""
    files = sorted((_HERE / "prompts").glob("*.txt"))
    return {file.stem: file.read_text(encoding="utf-8").rstrip("\n") for file in files}


def passages() -> dict[str, str]:
    """Six finished texts of 500 to 650 SmolLM2 tokens by name."""
    entries = json.loads((_HERE / "passages.json").read_text(encoding="utf-8"))
    return {entry["name"]: entry["text"] for entry in entries}
