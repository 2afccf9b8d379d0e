"""Where the compiled kernels come from, and what is said where there can be none."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.backends.cpu import build
from shoal.backends.cpu import kernels as native
from shoal.errors import ConfigError
from shoal.process.machine import cpu_flags

BEST, WIDENING, LEAST = build.TARGETS
ZIGLANG = [sys.executable, "-m", "ziglang", "c++", "-target", "x86_64-linux-gnu"]
# Two units, of which one needs the other, and what both include.
SOURCES = [
    ("add.cpp", '#include "add.hpp"\nint add(int a, int b) { return a + b; }\n'),
    ("add.hpp", "int add(int a, int b);\n"),
    ("twice.cpp", '#include "add.hpp"\nextern "C" int twice(int a) { return add(a, a); }\n'),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(build.FOLDER_VARIABLE, str(tmp_path / "kernels"))
    monkeypatch.setattr(build, "cpu_flags", lambda: BEST.flags)
    return tmp_path / "kernels"


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_it_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_sources", lambda: SOURCES)
    assert build.has_to_compile()
    made = build.library()
    assert not build.has_to_compile()
    assert ctypes.CDLL(str(made)).twice(21) == 42
    assert made.parent == folder
    assert [entry.name for entry in folder.iterdir()] == [made.name]
    monkeypatch.setenv("CXX", "/nowhere")
    assert build.library() == made
    made.chmod(0o777)
    with pytest.raises(ConfigError, match="written to by others"):
        build.library()


def test_who_comes_while_another_compiles_waits_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end, made, num_others = threading.Event(), Counter[str](), 3
    waiting: set[int] = set()
    others_wait = threading.Semaphore(0)
    try_lock = build._try_lock

    def tell(held: int) -> bool:
        found = try_lock(held)
        if not found and threading.get_ident() not in waiting:
            waiting.add(threading.get_ident())
            others_wait.release()
        return found

    def compile_slowly(command: object, sources: object, path: Path, within_s: object) -> None:
        made[path.name] += 1
        assert may_end.wait(20)
        path.write_bytes(b"library")

    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(build, "_try_lock", tell)
    monkeypatch.setattr(build, "_compile", compile_slowly)
    with ThreadPoolExecutor(1 + num_others) as threads:
        compiling = [threads.submit(build.compiled, folder, BEST) for _ in range(1 + num_others)]
        try:
            assert all(others_wait.acquire(timeout=20) for _ in range(num_others))
        finally:
            may_end.set()
        [path] = {one.result(20) for one in compiling}
    assert made == {path.name: 1}


def test_a_compiler_that_takes_too_long(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "slow"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CXX", str(tool))
    with pytest.raises(ConfigError, match=r"slow took longer than 0\.2 s"):
        build.compiled(folder, BEST, within_s=0.2)
    assert not list(folder.iterdir())


def test_a_wheels_own_comes_first(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it's of these sources, and though another could be compiled."""
    monkeypatch.setattr(build, "_compile", lambda command, sources, path, within_s: path.write_bytes(b"no library"))
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    folder.mkdir()
    shipped = tmp_path / build.SHIPPED
    shipped.mkdir()
    (shipped / "of-other-sources.so").write_bytes(b"")
    kept = build.library()
    assert kept.parent == folder
    made = build.compiled(shipped, BEST)
    assert build.library() == made == shipped / kept.name
    kept.unlink()
    assert not build.has_to_compile()
    with pytest.raises(ConfigError, match="install another"):
        native.load.__wrapped__()


def test_a_library_that_is_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiled", lambda into, target: into / "damaged.so")
    folder.mkdir()
    (folder / "damaged.so").write_bytes(b"no library")
    with pytest.raises(ConfigError, match=r"damaged\.so can't be loaded"):
        native.load.__wrapped__()  # what others have loaded stays theirs


@pytest.mark.long
@pytest.mark.skipif(build.find_spec("ziglang") is None, reason="there is no ziglang: pip install ziglang gets it")
def test_what_ziglang_compiles_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", shlex.join(ZIGLANG))
    monkeypatch.setattr(build, "cpu_flags", cpu_flags)
    build.library()  # without it the others would be skipped
    names = ("test_native.py", "test_int8_linear.py", "test_whole_linear.py", "test_crew.py")
    tests = [Path(__file__).with_name(name) for name in names]
    pytest_alone = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*pytest_alone, *tests], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    tool = tmp_path / "broken"
    tool.write_text("#!/bin/sh\necho out of luck >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CXX", str(tool))
    with pytest.raises(ConfigError, match="out of luck"):
        build.library()
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("lacking", "target"),
    [
        ((), BEST),
        (("avx512_bf16",), WIDENING),
        (("vpclmulqdq",), WIDENING),
        (("avx512_vnni",), LEAST),
        (("avx512_bf16", "avx512_vnni", "vpclmulqdq"), LEAST),
    ],
)
def test_each_cpu_gets_the_best_that_it_can_run(lacking: tuple[str, ...], target: build.Target) -> None:
    """Whatever else it has."""
    assert build.target_of((BEST.flags | {"amx_bf16"}) - set(lacking)) is target


def test_a_cpu_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: BEST.flags - {"avx512bw", "fma"})
    with pytest.raises(ConfigError, match="this CPU lacks avx512bw, fma"):
        build.library()
