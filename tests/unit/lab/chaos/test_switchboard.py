from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import shoal
from shoal_lab.chaos.switchboard import FrameFault, switching

# Says what it sees each time it's asked, and then the time.
SEES = f"""
import sys, time
sys.path.insert(0, {str(Path(shoal.__file__).parents[1])!r})
from shoal_lab.chaos.replicas import join_chaos
right = time.time
switchboard = join_chaos()
for _ in sys.stdin:
    print(switchboard.frame_fault.name, switchboard.rate, round(time.time() - right()), flush=True)
"""


def test_another_process_sees_what_is_set_at_once():
    with switching() as switchboard:
        seer = subprocess.Popen([sys.executable, "-c", SEES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with seer:
            assert seer.stdin and seer.stdout

            def seen() -> str:
                seer.stdin.write("\n")
                seer.stdin.flush()
                return seer.stdout.readline().strip()

            assert seen() == "NONE 0.0 0"
            switchboard.set_frame_fault(FrameFault.REORDER, 0.25)
            switchboard.clock_offset_s = -3600
            assert seen() == "REORDER 0.25 -3600"
            switchboard.set_frame_fault(FrameFault.NONE, 0)
            switchboard.clock_offset_s = 0
            assert seen() == "NONE 0.0 0"
            seer.stdin.close()
