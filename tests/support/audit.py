"""What is installed, as a list (CycloneDX), and what is known against it (pip-audit): ``make sbom``, ``make audit``.

The two programs have an environment of their own in ``.tools``, so that they aren't on the list. Where they or the
advisories can't be had, that is said, and nothing is claimed: a package that nobody was asked about isn't sound.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".tools" / "audit"
SBOM = ROOT / "build" / "sbom.json"
_PROGRAMS = ("pip-audit==2.10.1", "cyclonedx-bom==7.5.0")
_INSTALL_S, _AUDIT_S = 300, 300


class CanNotTell(Exception):
    """Why nothing is known."""


def program(name: str) -> str:
    """The path of one of the two, installed if it isn't yet. Raises CanNotTell."""
    found = FOLDER / "bin" / name
    if not found.exists():
        venv.create(FOLDER, with_pip=True, clear=True)
        _call(
            [str(FOLDER / "bin" / "pip"), "--disable-pip-version-check", "install", "--quiet", *_PROGRAMS], _INSTALL_S
        )
    return str(found)


def judge(report: Mapping[str, Any]) -> tuple[list[str], int, int]:
    """Of pip-audit's JSON: a line for each weakness, how many packages were looked up, and how many weren't known."""
    found = [
        f"{package['name']} {package['version']}: {weakness['id']}, "
        + (f"repaired in {', '.join(weakness['fix_versions'])}" if weakness["fix_versions"] else "not repaired yet")
        for package in report["dependencies"]
        for weakness in package.get("vulns", ())
    ]
    num_unknown = sum("skip_reason" in package for package in report["dependencies"])
    return found, len(report["dependencies"]) - num_unknown, num_unknown


def audit() -> int:
    """1 if something is known against a package, 0 if nothing is, or nobody could be asked; says which."""
    command = [program("pip-audit"), "--skip-editable", "--progress-spinner", "off", "--format", "json"]
    done = _run(command, _AUDIT_S, {"PIPAPI_PYTHON_LOCATION": sys.executable})
    try:
        found, num_known, num_unknown = judge(json.loads(done.stdout))
    except ValueError:
        raise CanNotTell(f"pip-audit: {_last_line(done)}") from None
    if not num_known:
        raise CanNotTell(f"the package index here has no advisories: none of {num_unknown} packages was looked up")
    for line in found:
        print(line)
    print(f"audit: {len(found)} known weaknesses in {num_known} packages; {num_unknown} that nobody knows of")
    return 1 if found else 0


def sbom() -> int:
    SBOM.parent.mkdir(exist_ok=True)
    _call(
        [program("cyclonedx-py"), "environment", sys.prefix, "--pyproject", str(ROOT / "pyproject.toml"),
         "--output-reproducible", "--output-format", "JSON", "--output-file", str(SBOM)], _AUDIT_S,
    )  # fmt: skip
    num_packages = len(json.loads(SBOM.read_text(encoding="utf-8"))["components"])
    print(f"sbom: {num_packages} packages of {sys.prefix} in {SBOM.relative_to(ROOT)}")
    return 0


def _call(command: Sequence[str], timeout_s: float) -> None:
    done = _run(command, timeout_s)
    if done.returncode:
        raise CanNotTell(f"{Path(command[0]).name}: {_last_line(done)}")


def _run(
    command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, **(environment or {})}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=own)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CanNotTell(str(error)) from error


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return ((done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def main(what: str) -> int:
    try:
        return {"audit": audit, "sbom": sbom}[what]()
    except CanNotTell as error:
        print(f"no {what}: {error}", file=sys.stderr)
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
