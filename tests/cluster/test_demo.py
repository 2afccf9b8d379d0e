"""``shoal demo`` as a newcomer runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import command_lines

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200)]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Of this demo alone: its processes are known by it. Short, for Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="t-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_the_demo_shows_what_it_measured_and_leaves_no_process(scratch: Path):
    code = "from shoal.cli import main; main()"
    said = subprocess.run(
        [sys.executable, "-c", code, "demo", "--max-tokens", "8"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert said.returncode == 0, said.stderr
    for stage in ("gateway", "queue", "reserve", "prefill", "transfer_exposed", "boundary_step", "residue"):
        assert re.search(rf"{stage}\s+.\s+-?[\d.]+", said.stdout), stage
    assert "24 of 30" in said.stdout and "30 of 30" in said.stdout
    assert "boundary token 4 bytes" in said.stdout and "NOT transferred" not in said.stdout
    for line in (r"full\s+.\s+none", r"default\s+.\s+6 of 30", r"deepest\s+.\s+10 of 30"):
        assert re.search(rf"{line}\s+.\s+\d+ ms", said.stdout), line
    assert [line for line in command_lines() if f"{scratch}/shoal-" in " ".join(line)] == []
