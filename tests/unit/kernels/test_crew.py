"""The kernels' own threads: every piece of every job is done once, however many call at a time."""

from __future__ import annotations

import subprocess
from importlib import resources
from pathlib import Path

import pytest

from shoal.kernels.build import CPU_FLAGS, compiler
from shoal.machine import cpu_flags

SOURCES = Path(str(resources.files("shoal.kernels"))) / "src"

pytestmark = pytest.mark.skipif(
    compiler() is None or not cpu_flags() >= CPU_FLAGS, reason="no compiler, or a CPU that the kernels aren't for"
)


@pytest.mark.parametrize("checked", [(), ("-fsanitize=thread", "-g")])
def test_each_piece_is_done_once(tmp_path: Path, checked: tuple[str, ...]):
    program = tmp_path / "stress"
    stress = Path(__file__).with_name("crew_stress.cpp")
    command = [
        *(compiler() or ()), "-O2", "-std=c++20", "-march=x86-64-v4", "-pthread", *checked,
        f"-I{SOURCES}", str(stress), str(SOURCES / "crew.cpp"), "-o", str(program),
    ]  # fmt: skip
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if checked and made.returncode:
        pytest.skip("this compiler has no thread sanitizer")
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 0, "no helper did anything: what was tested?"
