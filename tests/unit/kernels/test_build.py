"""Where the compiled kernels come from, and what is said where there can be none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shoal.errors import ConfigError
from shoal.kernels import build, native


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(build.FOLDER_VARIABLE, str(tmp_path / "kernels"))
    monkeypatch.setattr(build, "cpu_flags", lambda: build.CPU_FLAGS)
    return tmp_path / "kernels"


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_it_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build.library()
    assert made.parent == folder
    assert [entry.name for entry in folder.iterdir()] == [made.name]
    monkeypatch.setenv("CXX", "/nowhere")
    assert build.library() == made
    made.chmod(0o777)
    with pytest.raises(ConfigError, match="written to by others"):
        build.library()


def test_a_wheels_own_comes_first(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it's of these sources, and though another could be compiled."""
    monkeypatch.setattr(build, "_compile", lambda sources, options, path, within_s: path.write_bytes(b"no library"))
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    folder.mkdir()
    shipped = tmp_path / build.SHIPPED
    shipped.mkdir()
    (shipped / "of-other-sources.so").write_bytes(b"")
    kept = build.library()
    assert kept.parent == folder
    made = build.compiled(shipped)
    assert build.library() == made == shipped / kept.name
    with pytest.raises(ConfigError, match="install another"):
        native.load.__wrapped__()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere")
    with pytest.raises(ConfigError, match=r"install g\+\+"):
        build.library()


def test_a_library_that_is_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiled", lambda into: into / "damaged.so")
    folder.mkdir()
    (folder / "damaged.so").write_bytes(b"no library")
    with pytest.raises(ConfigError, match=r"damaged\.so can't be loaded"):
        native.load.__wrapped__()  # what others have loaded stays theirs


def test_a_compiler_may_have_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "true --quick")
    assert build.compiler() == ["true", "--quick"]


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    tool = tmp_path / "broken"
    tool.write_text("#!/bin/sh\necho out of luck >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CXX", str(tool))
    with pytest.raises(ConfigError, match="out of luck"):
        build.library()
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("true") is None:
        pytest.skip("no true")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setenv(build.FOLDER_VARIABLE, str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match=build.FOLDER_VARIABLE):
        build.library()


def test_a_cpu_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: build.CPU_FLAGS - {"avx512_bf16"})
    with pytest.raises(ConfigError, match="this CPU lacks avx512_bf16"):
        build.library()
