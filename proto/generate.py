"""Write services/shoal/v1 from the protos beside this file, or compare with ``--check``.

    python proto/generate.py            lint the protos, then write the generated files
    python proto/generate.py --check    lint, refuse breaking changes, compare byte for byte; 1 on a difference

The path of a proto is the path of its module (proto/shoal/v1/x.proto -> services/shoal/v1/x_pb2.py), so that what
protoc writes needs no rewriting. The generators' versions are pinned in pyproject.toml: others write other bytes.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

PROTO_ROOT = Path(__file__).resolve().parent
REPOSITORY = PROTO_ROOT.parent
PACKAGE = Path("shoal/v1")
TARGET = REPOSITORY / "services" / PACKAGE
PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


class GenerationError(Exception):
    """The protos or the generated files aren't as they must be; the message says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Generate services/shoal/v1 from proto/shoal/v1.")
    parser.add_argument("--check", action="store_true", help="compare with what is there instead of writing")
    check = parser.parse_args(arguments).check
    try:
        lint()
        if check:
            refuse_breaking_changes()
            compare()
        else:
            write()
    except GenerationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def lint() -> None:
    _buf("lint", str(PROTO_ROOT))


def refuse_breaking_changes() -> None:
    """Compare with the protos of the parent commit; of HEAD itself while the protos hold uncommitted changes."""
    changed = _git("status", "--porcelain", "--", str(PROTO_ROOT))
    base = "HEAD" if changed else "HEAD~1"
    archive = _git("archive", base, PROTO_ROOT.name)
    if archive is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        _buf("breaking", str(PROTO_ROOT), "--against", str(Path(folder) / PROTO_ROOT.name))


def write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
        for stale in _generated_in(TARGET).keys() - fresh.keys():
            (TARGET / stale).unlink()
        for name, content in fresh.items():
            (TARGET / name).write_bytes(content)


def compare() -> None:
    """Raise GenerationError that names every generated file that is missing, left over or different."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
    present = _generated_in(TARGET)
    differing = sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))
    if differing:
        names = ", ".join(differing)
        raise GenerationError(f"services/{PACKAGE} does not match the protos ({names}): run python proto/generate.py")


def generate(folder: Path) -> dict[str, bytes]:
    """Run protoc into ``folder`` and return the generated files' contents by name."""
    protos = sorted(str(path.relative_to(PROTO_ROOT)) for path in (PROTO_ROOT / PACKAGE).glob("*.proto"))
    well_known = str(resources.files("grpc_tools") / "_proto")
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "mypy", "grpc_python", "mypy_grpc")]
    plugins = [f"--plugin={name}={_tool(name)}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    status = protoc.main(["protoc", f"-I{PROTO_ROOT}", f"-I{well_known}", *plugins, *outputs, *protos])
    if status != 0:
        raise GenerationError(f"protoc failed with status {status}; its messages are above")
    return _generated_in(folder / PACKAGE)


def _generated_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for pattern in PATTERNS for path in folder.glob(pattern)}


def _buf(*arguments: str) -> None:
    done = subprocess.run([_tool("buf"), *arguments], check=False)
    if done.returncode != 0:
        raise GenerationError(f"buf {arguments[0]} found the problems above; repair the protos")


def _git(*arguments: str) -> bytes | None:
    """What git prints, or ``None`` where there's no repository, no such commit, or nothing there by that name."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def _tool(name: str) -> str:
    """The program of this name that was installed beside the running Python, else the one on the PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise GenerationError(f"{name} is missing: install the dev extra (make .venv)")
    return found


if __name__ == "__main__":
    sys.exit(main())
