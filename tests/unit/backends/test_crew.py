"""The kernels' own threads: each piece counts once, however many call at a time, and whoever is left behind."""

from __future__ import annotations

import subprocess
from importlib import resources
from pathlib import Path

import pytest

from shoal.backends.cpu.build import compiler, fits, target_of
from shoal.process.machine import cpu_flags

SOURCES = Path(str(resources.files("shoal.backends.cpu"))) / "src"

pytestmark = pytest.mark.skipif(
    compiler() is None or not fits(cpu_flags()), reason="no compiler, or a CPU that the kernels aren't for"
)


def _ran(folder: Path, source: str, checked: tuple[str, ...]) -> int:
    """What the program printed. It is skipped where it is to be ``checked`` by what this compiler doesn't have."""
    program = folder / "stress"
    command = [
        *(compiler() or ()), *target_of(cpu_flags()).options, "-O2", *checked,
        f"-I{SOURCES}", str(Path(__file__).with_name(source)), str(SOURCES / "crew.cpp"), "-o", str(program),
    ]  # fmt: skip
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if checked and made.returncode:
        pytest.skip("this compiler has no thread sanitizer")
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


@pytest.mark.parametrize("checked", [(), ("-fsanitize=thread", "-g")])
def test_each_piece_is_done_once(tmp_path: Path, checked: tuple[str, ...]):
    assert _ran(tmp_path, "crew_stress.cpp", checked) > 0, "no helper did anything: what was tested?"


@pytest.mark.parametrize("checked", [(), ("-fsanitize=thread", "-g")])
def test_who_goes_together_waits_for_nobody(tmp_path: Path, checked: tuple[str, ...]):
    """In each round a thread goes on only when others have come further: they must have done its piece."""
    assert _ran(tmp_path, "together_stress.cpp", checked) > 100, "in most rounds nobody was left behind"
