"""``shoal demo`` as a newcomer runs it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200)]


def test_the_demo_shows_what_it_measured_and_leaves_no_process():
    code = "from shoal.cli import main; main()"
    said = subprocess.run(
        [sys.executable, "-c", code, "demo", "--max-tokens", "8"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env=None,
    )
    assert said.returncode == 0, said.stderr
    for stage in ("gateway", "queue", "reserve", "prefill", "transfer_exposed", "boundary_step", "residue"):
        assert re.search(rf"{stage}\s+.\s+-?[\d.]+", said.stdout), stage
    assert "20 of 30" in said.stdout and "30 of 30" in said.stdout
    assert "boundary token 4 bytes" in said.stdout and "NOT transferred" not in said.stdout
    assert "tokens agreed" in said.stdout
    left = subprocess.run(["pgrep", "-f", "shoal-[a-z0-9_]{8}/r/session"], capture_output=True, text=True, check=False)
    assert left.stdout == ""
