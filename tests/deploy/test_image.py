"""deploy/Dockerfile, and the style of all that is deployed."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from yamllint import linter
from yamllint.config import YamlLintConfig

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
YAML = [ROOT / "docker-compose.yml", *sorted((ROOT / "deploy").rglob("*.y*ml"))]
STYLE = YamlLintConfig(
    """
    extends: default
    rules:
      comments: {min-spaces-from-content: 1}
      document-start: disable
      line-length: {max: 120}
    """
)


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} (.+)$", DOCKERFILE, re.MULTILINE)


def test_hadolint_has_nothing_to_say() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("hadolint isn't here: install the dev extra")
    done = subprocess.run(
        [program, ROOT / "deploy/Dockerfile"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", YAML, ids=lambda path: str(path.relative_to(ROOT)))
def test_yamllint_has_nothing_to_say(path: Path) -> None:
    assert list(linter.run(path.read_text(), STYLE, str(path))) == []


def test_it_does_not_run_as_root() -> None:
    assert instructions("USER") == ["10001:10001"]
    # The last user is the one that runs, and it is set in the image that ships.
    assert DOCKERFILE.rindex("\nUSER ") > DOCKERFILE.rindex("\nFROM ")


def test_what_it_copies_is_there_and_reaches_the_build() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    sources = [word for line in instructions("COPY") if "--from" not in line for word in line.split()[:-1]]
    assert sources and all((ROOT / source).exists() and f"!{source}" in ignore for source in sources)
    assert "*" in ignore


def test_its_ray_is_the_one_that_kuberay_is_told() -> None:
    chart = yaml.safe_load((ROOT / "helm" / "shoal" / "values.yaml").read_text())
    [version] = [line.partition("=")[2] for line in instructions("ARG") if line.startswith("RAY_VERSION=")]
    assert version == chart["image"]["rayVersion"]
    words = shlex.split(command_with("mkdir -p services/shoal").rpartition("&&")[2].replace("\\\n", " "))
    assert words[-1] == "${RAY_VERSION:+ray==$RAY_VERSION}"


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """What .dockerignore lets through, by which the build begins."""
    for name in (line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(commands: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["sh", "-c", commands], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip


def command_with(text: str) -> str:
    """The RUN with ``text`` in it, but nothing is downloaded for it."""
    [command] = [line for line in re.findall(r"^RUN ((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE) if text in line]
    return re.sub(r"pip (wheel|install)", r"pip \1 --no-build-isolation --no-deps", command)


def test_its_dependencies_need_no_source(context: Path) -> None:
    shutil.rmtree(context / "services")
    (context / "LICENSE").unlink()
    command = command_with("mkdir -p services/shoal").replace("pip install", "pip install --dry-run --ignore-installed")
    done = run(command, context)
    assert done.returncode == 0, done.stderr
    assert "Would install shoal-" in done.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="there are no kernels for this processor")
def test_it_gets_a_wheel_with_kernels_or_an_error(context: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = command_with("pip wheel").rpartition("&& pip install")[0].rstrip("\\\n ")
    assert re.search(r"apt-get install .*g\+\+", DOCKERFILE.partition("pip wheel")[0])
    monkeypatch.setenv("CXX", "/nowhere")
    done = run(command, context)
    assert done.returncode and "install g++" in done.stdout + done.stderr
    compiler = context / "compiler"  # of the real one, and of what it makes, test_wheel.py has tests
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho compiled >"$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    done = run(command, context)
    assert done.returncode == 0, done.stderr
    [wheel] = (context / "dist").iterdir()
    assert wheel.name.endswith("_x86_64.whl")
