"""The fenced blocks of the documents, and those that talk to a server, run against one.

A block is run if it is Python that names the server, or a shell block that begins with ``curl``; ``127.0.0.1:8000``
(HTTP) and ``127.0.0.1:9000`` (gRPC) stand for the server. What the document shows right below a block as its answer
must have the shape of the real one, and a ``print(…)  # -> text`` must print that text.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """``answer`` is the block right below, where that one shows JSON or the events of a stream."""

    document: str
    line: int
    language: str
    text: str
    answer: str | None = None

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def asks_a_server(self) -> bool:
        if self.language == "python":
            return "127.0.0.1:" in self.text
        return self.language == "sh" and self.text.startswith("curl ")


def blocks(document: str) -> Iterator[Block]:
    """All fenced blocks of a document, whose path is relative to the repository."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        below = _FENCE.match(text, match.end() + 1)
        shows_answer = below is not None and (below[1] == "json" or below[2].startswith("data: "))
        answer = below[2] if below is not None and shows_answer else None
        yield Block(document, text.count("\n", 0, match.start()) + 1, match[1], match[2], answer)


def live_blocks(*documents: str) -> list[Block]:
    """Those that ask a server."""
    return [block for document in documents for block in blocks(document) if block.asks_a_server]


def run(block: Block, http_port: int, grpc_port: int, timeout_s: float = 120) -> str:
    """What ``block`` prints. AssertionError if it fails, or if the document shows something else."""
    code = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{http_port}")
    code = code.replace("127.0.0.1:9000", f"127.0.0.1:{grpc_port}")
    command = [sys.executable, "-c", code] if block.language == "python" else ["bash", "-euc", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{block}: {done.stderr}"
    assert done.stdout.strip(), f"{block} prints nothing"
    for told in re.findall(r"^ *print\(.*# -> (.+)$", block.text, re.MULTILINE):
        assert told in done.stdout, f"{block}: {done.stdout}"
    if block.language == "sh":
        _compare(block, done.stdout)
    return done.stdout


def _compare(block: Block, answer: str) -> None:
    if block.answer is not None:
        assert _shapes(answer) == _shapes(block.answer), f"{block}: {answer}"
    else:
        assert "error" not in json.loads(answer), f"{block}: {answer}"


def _shapes(answer: str) -> set[str]:
    """The shape of a JSON document, or of each event of a stream."""
    if not answer.startswith("data: "):
        return {json.dumps(_shape(json.loads(answer)))}
    events = [event.removeprefix("data: ") for event in answer.split("\n\n") if event.strip()]
    return {event.strip() if event.startswith("[") else json.dumps(_shape(json.loads(event))) for event in events}


def _shape(value: Any) -> Any:
    """``value`` with its keys alone; a list is what its first item is."""
    if isinstance(value, dict):
        return {key: _shape(one) for key, one in sorted(value.items())}
    if isinstance(value, list):
        return [_shape(one) for one in value[:1]]
    return "…"
