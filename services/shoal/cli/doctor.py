"""What this machine can run, and what to do about what it can't.

Each ``judge_…`` turns measured values into a finding and is pure; ``examine`` measures. The heavy libraries load
inside the probes, so that a broken one is a finding and not a crash.
"""

from __future__ import annotations

import enum
import importlib
import importlib.metadata
import os
import re
import shutil
import socket
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from rich.table import Table
from rich.text import Text

from shoal.errors import ConfigError, ModelError
from shoal.process.machine import available_memory_bytes, cpu_flags, multiplies_bfloat16, usable_cores

GIB = 1 << 30
_SHM = "/dev/shm"  # noqa: S108  looked at, not written to
_INSTALL = "pip install '.[serve]'"


class Level(enum.StrEnum):
    """``WARN``: it works, but less well. ``FAIL``: ``shoal serve`` can't start."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """``what`` was found; ``next_step`` is empty where nothing needs doing."""

    name: str
    level: Level
    what: str
    next_step: str = ""


def examine(ports: Iterable[int] = (8000, 9000)) -> list[Finding]:
    """Look at everything that ``shoal serve`` depends on. Takes a few seconds, most of it loading torch and Ray."""
    memory = judge_memory(available_memory_bytes())  # before torch takes some
    lacks_kernels = _why_no_kernels()
    return [
        judge_python(sys.version_info[:3]),
        judge_cores(usable_cores()),
        memory,
        judge_shared_memory(_free_bytes(Path(_SHM))),
        *_examine_torch(lacks_kernels is None),
        _examine_kernels(lacks_kernels),
        judge_ray(_version_of("ray")),
        judge_nixl(_version_of("nixl")),
        _examine_model("smollm2"),
        *(judge_port(port, free=is_port_free(port)) for port in ports),
    ]


def worst(findings: Iterable[Finding]) -> Level:
    """The level that the whole machine has."""
    levels = {finding.level for finding in findings}
    return next((level for level in (Level.FAIL, Level.WARN) if level in levels), Level.OK)


def render(findings: Iterable[Finding]) -> Table:
    """The findings as a table for a terminal, one a row."""
    colors = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "what", "found", "to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        level = Text(finding.level, style=colors[finding.level])
        table.add_row(level, Text(finding.name), Text(finding.what), Text(finding.next_step))
    return table


# --- judging --------------------------------------------------------------------------------------------


def judge_python(version: tuple[int, ...]) -> Finding:
    what = ".".join(map(str, version))
    if version < (3, 11):
        return Finding("Python", Level.FAIL, what, "install Python 3.11 or newer")
    return Finding("Python", Level.OK, what)


def judge_cores(num_cores: float) -> Finding:
    what = f"{num_cores:g} usable"
    if num_cores < 2:
        return Finding("cores", Level.WARN, what, "give it two: the pools will take turns on one, and be slow")
    return Finding("cores", Level.OK, what)


def judge_memory(available_bytes: int) -> Finding:
    what = f"{available_bytes / GIB:.1f} GiB available"
    if available_bytes < 2 * GIB:
        return Finding("memory", Level.FAIL, what, "free some: Ray and two replicas of a small model take 2 GiB")
    if available_bytes < 4 * GIB:
        return Finding("memory", Level.WARN, what, "keep both pools small: set num_blocks of prefill and decode")
    return Finding("memory", Level.OK, what)


def judge_shared_memory(free_bytes: int | None) -> Finding:
    if free_bytes is None:
        return Finding(_SHM, Level.WARN, "missing", "mount a tmpfs there, or Ray's object store will be on disk")
    what = f"{free_bytes / GIB:.1f} GiB free"
    if free_bytes < GIB:
        return Finding(_SHM, Level.WARN, what, "in a container, start it with --shm-size=2g")
    return Finding(_SHM, Level.OK, what)


def judge_bf16(*, native: bool, bf16_flops: float, float32_flops: float, has_kernels: bool = False) -> Finding:
    """``native``: the CPU has bf16 dot products; ``has_kernels``: Shoal's own can do without. Rates are floating-point
    operations per second of one GEMM of torch's."""
    what = f"GEMM {bf16_flops / 1e9:.0f} GFLOP/s, float32 {float32_flops / 1e9:.0f}"
    if not native and has_kernels:
        return Finding("bfloat16", Level.OK, f"not native: Shoal's kernels multiply it as float32; torch's {what}")
    if not native:
        return Finding("bfloat16", Level.WARN, f"not native; {what}", "nothing: dtype auto uses float32 here")
    if bf16_flops < float32_flops:
        return Finding("bfloat16", Level.WARN, f"native, but slower; {what}", "serve with --dtype float32")
    return Finding("bfloat16", Level.OK, f"native; {what}")


def judge_gpus(gpus: list[tuple[str, int]], triton_lacks: str | None = None) -> Finding:
    """``gpus``: name and memory in bytes of each. ``triton_lacks``: what kernels there can't do without."""
    if not gpus:
        return Finding("GPU", Level.OK, "none: everything runs on the CPU")
    what = ", ".join(f"{name} ({size / GIB:.0f} GiB)" for name, size in gpus)
    if triton_lacks is None:
        return Finding("GPU", Level.OK, what)
    return Finding("GPU", Level.WARN, f"{what}; torch computes alone", f"install {triton_lacks}: steps take less time")


def judge_kernels(problem: str | None, *, fits_cpu: bool, has_tiles: bool = False) -> Finding:
    """``problem``: why torch computes instead. Where the CPU is it, nothing can be done."""
    if problem is None:
        return Finding("kernels", Level.OK, "Shoal's own" + (", with the matrix unit (AMX)" if has_tiles else ""))
    if not fits_cpu:
        return Finding("kernels", Level.OK, f"torch's: {problem}")
    return Finding("kernels", Level.WARN, f"torch's: {problem}", "mend it: with Shoal's own, everything is faster")


def judge_ray(version: str | None) -> Finding:
    if version is None:
        return Finding("Ray", Level.FAIL, "can't be imported", _INSTALL)
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < (2, 60):
        return Finding("Ray", Level.FAIL, version, f"{_INSTALL} --upgrade: 2.60 or newer is needed")
    return Finding("Ray", Level.OK, version)


def judge_nixl(version: str | None) -> Finding:
    if version is None:
        return Finding("NIXL", Level.OK, "not installed: between hosts, hand-offs go over gRPC")
    return Finding("NIXL", Level.OK, version)


def judge_port(port: int, *, free: bool) -> Finding:
    name = f"port {port}"
    if not free:
        return Finding(name, Level.WARN, "taken", "end what listens there, or choose --port and --grpc-port")
    return Finding(name, Level.OK, "free on 127.0.0.1")


# --- measuring ------------------------------------------------------------------------------------------


def is_port_free(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        # A port whose last connections are in TIME_WAIT is free to a server.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def gemm_flops(torch: ModuleType, dtype: object, size: int = 512, num_tries: int = 5) -> float:
    """Floating-point operations per second of the best of a few ``size``-cubed matrix products."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    _seconds(lambda: left @ right)  # the first one pays for threads and kernels
    return 2 * size**3 / min(_seconds(lambda: left @ right) for _ in range(num_tries))


def _examine_torch(has_kernels: bool) -> list[Finding]:
    torch = _load("torch")
    if torch is None:
        return [Finding("torch", Level.FAIL, "can't be imported", _INSTALL)]
    cuda = torch.cuda
    gpus = [cuda.get_device_properties(index) for index in range(cuda.device_count() if cuda.is_available() else 0)]
    return [
        Finding("torch", Level.OK, str(torch.__version__)),
        judge_bf16(
            native=multiplies_bfloat16(),
            bf16_flops=gemm_flops(torch, torch.bfloat16),
            float32_flops=gemm_flops(torch, torch.float32),
            has_kernels=has_kernels,
        ),
        judge_gpus([(gpu.name, gpu.total_memory) for gpu in gpus], _what_triton_lacks()),
    ]


def _what_triton_lacks() -> str | None:
    if find_spec("triton") is None:
        return "triton"
    compilers = [os.environ.get("CC", ""), "clang", "gcc"]
    if not any(shutil.which(name) for name in compilers):
        return "gcc, which Triton starts its kernels with"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return None if header.exists() else f"Python's headers ({header} is missing), which Triton compiles with"


def _why_no_kernels() -> str | None:
    """Of Shoal's own; ``None``: they can be loaded."""
    native = _load("shoal.backends.cpu.kernels")
    if native is None:
        return "torch can't be imported"
    try:
        native.load()
    except ConfigError as error:
        return error.message
    return None


def _examine_kernels(problem: str | None) -> Finding:
    if problem is not None:
        return judge_kernels(problem, fits_cpu=importlib.import_module("shoal.backends.cpu.build").fits(cpu_flags()))
    has_tiles = importlib.import_module("shoal.backends.cpu.kernels").load().use_tiles()
    return judge_kernels(None, fits_cpu=True, has_tiles=has_tiles)


def _examine_model(name: str) -> Finding:
    files = _load("shoal.model.files")
    if files is None:
        return Finding(f"model {name}", Level.FAIL, "can't look: torch or transformers is missing", _INSTALL)
    try:
        return Finding(f"model {name}", Level.OK, str(files.locate(name).path))
    except ModelError as error:
        return Finding(f"model {name}", Level.WARN, "not found", error.message)


def _version_of(package: str) -> str | None:
    """The version of a package that really loads."""
    if _load(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _load(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except Exception:  # noqa: BLE001 - a missing shared library, one that doesn't fit another: of many kinds
        return None


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
