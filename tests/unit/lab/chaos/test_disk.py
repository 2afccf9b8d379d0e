from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import shoal

WRITES = f"""
import sys
sys.path.insert(0, {str(Path(shoal.__file__).parents[1])!r})
path = sys.argv[1]
from shoal_lab.chaos.disk import limit_files
def can_write():
    try:
        with open(path, "w") as file: file.write("x")
    except OSError: return False
    return True
print(can_write(), flush=True)
limit_files(0, is_full=True)
print(can_write(), flush=True)
limit_files(0, is_full=False)
print(can_write(), flush=True)
"""


def test_on_a_full_disk_nothing_can_be_written_until_it_has_room_again(tmp_path: Path):
    found = subprocess.run(
        [sys.executable, "-c", WRITES, str(tmp_path / "file")], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["True", "False", "True"]
