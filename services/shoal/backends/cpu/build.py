"""Compile src/ into one shared library for a kind of processor, under the digest of all that it depends on.

A wheel brings it along (services/compile_kernels.py). Elsewhere it's compiled once, by several cores, at the first
start, and kept in the user's cache. Of replicas that start together one compiles it, and the others wait.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from shoal.errors import ConfigError
from shoal.process.machine import cpu_flags, usable_threads


@dataclass(frozen=True)
class Target:
    """Processors that a library is compiled for: what they must have, as /proc/cpuinfo names it, and the options that
    let the compiler use it."""

    flags: frozenset[str]
    options: tuple[str, ...]


_FLAGS = frozenset({
    "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "popcnt", "pclmulqdq",
    "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl",
})  # fmt: skip
# One by one: ziglang knows levels of x86-64 by other names.
_OPTIONS = (
    "-O3", "-std=c++20", "-pthread", "-fPIC",
    "-mavx2", "-mbmi", "-mbmi2", "-mf16c", "-mfma", "-mlzcnt", "-mmovbe", "-mpopcnt", "-mpclmul",
    "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl",
)  # fmt: skip
# The best first. AMD's Zen 4 and Intel's Sapphire Rapids, and later ones; from Intel's Cascade Lake on, which widen
# bfloat16 to multiply it (src/pairs.hpp); and all with AVX-512, which widen bytes, too (src/bytes.hpp).
TARGETS = (
    Target(
        _FLAGS | {"avx512_bf16", "avx512_vnni", "vpclmulqdq"},
        (*_OPTIONS, "-mavx512bf16", "-mavx512vnni", "-mvpclmulqdq"),
    ),
    Target(_FLAGS | {"avx512_vnni"}, (*_OPTIONS, "-mavx512vnni")),
    Target(_FLAGS, _OPTIONS),
)
_TIMEOUT_S = 300  # ziglang compiles its own C++ library first, once: on two cores a minute
# At once: each takes up to 0.3 GB.
_MAX_COMPILERS = 4
# Where to keep it instead of in the user's cache.
FOLDER_VARIABLE = "SHOAL_KERNELS_FOLDER"
# Where a wheel has it, as a part of the package.
SHIPPED = "compiled"


def library() -> Path:
    """The compiled library, compiling it if need be. Raises ConfigError that says why there can't be one."""
    target = target_of(cpu_flags())
    shipped = _shipped(target)
    return shipped if shipped.exists() else _kept(target)


def has_to_compile() -> bool:
    """Whether ``library`` would take the seconds that a compiler takes."""
    try:
        target = target_of(cpu_flags())
        kept = _folder() / _file_name(_sources(), target.options)
        return not (_shipped(target).exists() or kept.exists()) and compiler() is not None
    except (ConfigError, OSError):  # who needs it says why
        return False


def target_of(flags: AbstractSet[str]) -> Target:
    """The best for a CPU that has ``flags``. Raises ConfigError if it lacks what all of them need."""
    for target in TARGETS:
        if target.flags <= flags:
            return target
    raise ConfigError(f"this CPU lacks {', '.join(sorted(TARGETS[-1].flags - flags))}")


def fits(flags: AbstractSet[str]) -> bool:
    """Whether there is one for a CPU that has ``flags``."""
    return any(target.flags <= flags for target in TARGETS)


def _shipped(target: Target) -> Path:
    return Path(__file__).parent / SHIPPED / _file_name(_sources(), target.options)


def _folder() -> Path:
    from platformdirs import user_cache_path  # isn't there where a wheel is built

    return Path(os.environ.get(FOLDER_VARIABLE) or user_cache_path("shoal") / "kernels")


def _kept(target: Target) -> Path:
    folder = _folder()
    try:
        path = compiled(folder, target)
        if not _is_ours(path):
            raise ConfigError(f"{path} can be written to by others, so it isn't loaded: remove it")
    except OSError as error:
        raise ConfigError(f"no library can be kept in {folder} ({error.strerror}): set {FOLDER_VARIABLE}") from error
    return path


def compiled(folder: Path, target: Target, *options: str, within_s: float = _TIMEOUT_S) -> Path:
    """The library in ``folder``, for whatever CPU has the instructions. Raises ConfigError or OSError."""
    sources, options = _sources(), (*target.options, *options)
    path = folder / _file_name(sources, options)
    if path.exists():
        return path
    tool = compiler()
    if tool is None:
        raise ConfigError("no C++ compiler is at hand: install g++, or ziglang by pip")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone_in(folder, within_s):
        if not path.exists():
            _compile([*tool, *options], sources, path, within_s)
    return path


def compiler() -> list[str] | None:
    """The C++ compiler that ``CXX`` names, its options included; else the first that is there of g++, Clang, and the
    Clang that ziglang brings, which needs nothing of the system's."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named if shutil.which(named[0]) else None
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return [name]
    if find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++", "-target", "x86_64-linux-gnu"]  # else it would be this CPU
    return None


def _sources() -> list[tuple[str, str]]:
    folder = resources.files("shoal.backends.cpu") / "src"
    return sorted((entry.name, entry.read_text(encoding="utf-8")) for entry in folder.iterdir())


def _file_name(sources: Iterable[tuple[str, str]], options: Iterable[str]) -> str:
    digest = sha256("\0".join([*options, *(text for pair in sources for text in pair)]).encode()).hexdigest()
    return f"{digest[:32]}.so"


@contextmanager
def _alone_in(folder: Path, within_s: float) -> Iterator[None]:
    """While nobody else is: two that compile would only take each other's cores. Whoever is there for longer than
    ``within_s`` hangs, and is waited for no more."""
    held = os.open(folder, os.O_RDONLY)
    deadline_s = time.monotonic() + within_s
    try:
        while not _try_lock(held) and time.monotonic() < deadline_s:
            threading.Event().wait(0.1)  # nobody tells
        yield
    finally:
        os.close(held)


def _try_lock(folder: int) -> bool:
    """Whether it's ours now, as far as it can be: where a file system locks nothing, each compiles the same."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _compile(command: list[str], sources: Iterable[tuple[str, str]], path: Path, within_s: float) -> None:
    deadline_s = time.monotonic() + within_s

    def run(*arguments: str) -> None:
        left_s = deadline_s - time.monotonic()
        subprocess.run([*command, *arguments], check=True, capture_output=True, timeout=left_s)

    def compile_one(unit: Path) -> str:
        made = str(unit.with_suffix(".o"))
        run("-c", "-o", made, str(unit))
        return made

    try:
        num_threads = min(usable_threads(), _MAX_COMPILERS)
        with tempfile.TemporaryDirectory(dir=path.parent) as name, ThreadPoolExecutor(num_threads) as threads:
            folder = Path(name)
            for source, text in sources:
                (folder / source).write_text(text, encoding="utf-8")
            objects = list(threads.map(compile_one, sorted(folder.glob("*.cpp"))))
            made = folder / "library"
            run("-shared", "-o", str(made), *objects)
            made.chmod(0o755)
            made.replace(path)
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"{command[0]} failed: {error.stderr.decode(errors='replace').strip()[-500:]}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{command[0]} took longer than {within_s:g} s") from error
    except RuntimeError as error:  # no thread can be had
        raise ConfigError(f"{command[0]} can't be run: {error}") from error


def _is_ours(path: Path) -> bool:
    """It is code: nobody but its owner may have written it, and the owner is we or the system."""
    found = path.stat()
    return found.st_uid in {os.getuid(), 0} and not found.st_mode & 0o022
