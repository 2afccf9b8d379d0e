"""``shoal chaos`` shortened: every scenario, on a tiny model and over mutual TLS, beside the tests that run then."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import shoal

NUM_REQUESTS, NUM_IN_FLIGHT = 40, 32
_WITHIN_S = 1200

# In a process of its own, as the command is: it sets the environment of all that it starts. The lowest priority, since
# its own limits are wide, and those of the tests beside it aren't. Where Linux groups processes by their session, one's
# niceness counts within its group alone.
_RUN = f"""
import os, sys
from contextlib import suppress
from pathlib import Path
with suppress(OSError):
    Path("/proc/self/autogroup").write_text("19")
os.nice(19)
import torch
from models import save_tiny
from shoal.chaos.play import Limits
from shoal.chaos.run import ChaosOptions, run
from shoal.chaos.scenario import SCENARIOS
folder = Path(sys.argv[1])
save_tiny(folder / "tiny", dtype=torch.float32)
limits = Limits({NUM_REQUESTS}, {NUM_IN_FLIGHT}, deadline_s=60, recover_within_s=180)
options = ChaosOptions(str(folder / "tiny"), SCENARIOS, limits, num_cases=16, num_burst=24, ttl_s=1, tls=True)
report = run(options, lambda *step: None, lambda result: print(result))
(folder / "chaos.json").write_text(report.to_json())
"""


@dataclass(frozen=True)
class Begun:
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8")


@functools.cache
def begin() -> Begun:
    """Once a run of tests. It takes about as long as all other tests with clusters."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-test-chaos-"))
    path = os.pathsep.join([str(Path(shoal.__file__).parents[1]), str(Path(__file__).parent)])
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN, str(folder)],
            env=os.environ | {"PYTHONPATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Begun(process, folder)


def results() -> list[dict[str, object]]:
    """Of each scenario; waits for them."""
    begun = begin()
    status = begun.process.wait(_WITHIN_S)
    assert status == 0, begun.log[-6000:]
    found: list[dict[str, object]] = json.loads((begun.folder / "chaos.json").read_text())["results"]
    return found


def end() -> None:
    """If it was begun and nobody waited for it."""
    if begin.cache_info().currsize and begin().process.poll() is None:
        begin().process.terminate()
        with suppress(subprocess.TimeoutExpired):
            begin().process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(begin().process.pid, signal.SIGKILL)
