"""What a wheel brings along, and what it does where there is no compiler."""

from __future__ import annotations

import os
import platform
import re
import shlex
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shoal.backends import cpu as kernels
from shoal.backends.cpu.build import TARGETS, compiler, fits
from shoal.process.machine import cpu_flags

ROOT = Path(__file__).parents[2]
IS_OF_KERNELS = platform.machine() == "x86_64"
SYSTEM_HEADERS = re.compile(r"#include <(\S+)>")
# By the kernels that were found, of 3 + 4 the sum.
ADDS = """
import torch
from shoal.backends.cpu import build, kernels as native
print(build.library())
total = native.load().add(torch.full((1, 64), 3.0).bfloat16(), torch.full((1, 64), 4.0).bfloat16())
print(total.unique().item())
"""


def made(folder: Path, **variables: str) -> tuple[Path, str]:
    """The wheel, and what was said about it."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=True, timeout=300
    )
    [wheel] = folder.iterdir()
    return wheel, done.stdout + done.stderr


def libraries(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if name.endswith(".so")]


def quick_compiler(folder: Path) -> Path:
    """This machine's, which takes a fraction of the time where it needn't make quick code, and finds read what all
    units would read anew. (Compiled headers that aren't of a unit's options are passed over.)"""
    path, headers, tool = folder / "quick", folder / "all.hpp", compiler() or []
    sources = Path(kernels.__file__).parent / "src"
    names = sorted({name for source in sources.iterdir() for name in SYSTEM_HEADERS.findall(source.read_text())})
    headers.write_text("".join(f"#include <{name}>\n" for name in names))
    (folder / "all.hpp.gch").mkdir()
    for index, target in enumerate(TARGETS):
        made = folder / "all.hpp.gch" / str(index)
        subprocess.run(
            [*tool, *target.options, "-O0", "-x", "c++-header", "-o", made, headers], check=True, timeout=100
        )
    path.write_text(f'#!/bin/sh\nexec {shlex.join(tool)} "$@" -O0 -include {headers}\n')
    path.chmod(0o755)
    return path


@pytest.mark.slow
@pytest.mark.skipif(not IS_OF_KERNELS, reason="there are no kernels for this processor")
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_its_kernels_are_found_where_there_is_no_compiler(tmp_path: Path) -> None:
    wheel, _ = made(tmp_path / "wheel", CXX=str(quick_compiler(tmp_path)))
    shipped = libraries(wheel)
    assert len(shipped) == len(TARGETS)
    assert wheel.name.endswith("_x86_64.whl") and "-py3-none-" in wheel.name
    assert "linux_x86_64" not in wheel.name.replace("manylinux", ""), "an older C library must refuse it"
    package = tmp_path / "package"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(package)
        [about] = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        assert "Root-Is-Purelib: false" in archive.read(about).decode()
        for library in shipped:
            assert stat.S_IMODE(archive.getinfo(library).external_attr >> 16) & 0o444 == 0o444, "others may read it"
    if not fits(cpu_flags()):
        pytest.skip("this CPU can't run them")
    kept = tmp_path / "kept"
    without = {"PYTHONPATH": str(package), "CXX": "/nowhere", "SHOAL_KERNELS_FOLDER": str(kept)}
    done = subprocess.run(
        [sys.executable, "-c", ADDS], cwd=tmp_path, env=os.environ | without, capture_output=True, text=True,
        check=True, timeout=120,
    )  # fmt: skip
    found, total = done.stdout.split()
    assert found in {str(package / library) for library in shipped}
    assert total == "7.0"
    assert not kept.exists()


@pytest.mark.parametrize("compiler", ["/nowhere", "broken"])
def test_without_a_compiler_it_is_one_for_any_machine(tmp_path: Path, compiler: str) -> None:
    if compiler == "broken":  # a file that may be run, but can't be
        compiler = str(tmp_path / "broken")
        Path(compiler).write_bytes(b"\0")
        Path(compiler).chmod(0o755)
    wheel, said = made(tmp_path / "wheel", CXX=compiler)
    assert wheel.name.endswith("-py3-none-any.whl") and not libraries(wheel)
    if IS_OF_KERNELS:
        assert "without compiled kernels" in said and ("install g++" in said or "broken" in said)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    # With what compiles them later, and without what made it.
    assert {"shoal/py.typed", "shoal/backends/cpu/src/linear.cpp", "shoal/backends/cpu/build.py"} <= names
    assert not any("compile_kernels" in name for name in names)
