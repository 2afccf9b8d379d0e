"""What this process may use of its machine. A container's limits are its cgroup's; /proc tells of the whole machine."""

from __future__ import annotations

import ipaddress
import os
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

# What binds all interfaces, and where this machine reaches it.
EVERY_INTERFACE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing is bound here
# In a container, this is its own cgroup. Version 1 has a folder for each controller.
CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> float:
    """Cores that this process may run on: its affinity, or its cgroup's quota if that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    if (quota := _cpu_quota()) is not None:
        return min(cores, quota)
    return cores


def usable_threads() -> int:
    """As many as whole cores, so that none is throttled; at least one."""
    return max(1, int(usable_cores()))


def step_back(niceness: int) -> None:
    """Make the calling thread, and all that it starts from now on, so much nicer to others: nice(2), which on Linux is
    each thread's own, and 19 at most. Nobody becomes less nice again. Where the system forbids it, nothing happens."""
    if niceness and sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + niceness)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what binds ``host``. Nobody is asked what a name means, so few names are."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def cpu_flags() -> frozenset[str]:
    """What the processor can do, as Linux names it (``flags`` on x86, ``Features`` on Arm)."""
    lines = _text(Path("/proc/cpuinfo")).splitlines()
    told = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(told.partition(":")[2].split())


@cache
def is_intels() -> bool:
    """Whether Intel made the processor, whose libraries know its own best."""
    return any(line.split() == ["vendor_id", ":", "GenuineIntel"] for line in _text(Path("/proc/cpuinfo")).splitlines())


@cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has products of bfloat16; elsewhere torch emulates them, slower than those of float32."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})  # the last on Arm


def available_memory_bytes() -> int:
    """What the machine could still give, or what the cgroup leaves if that is less."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = _numbers(Path("/proc/meminfo")).get("MemAvailable:", available // 1024) * 1024
    if (left := _memory_left()) is not None:
        return min(available, left)
    return available


def _cpu_quota() -> float | None:
    """In cores; ``None`` without one."""
    quota, _, period = _line(CGROUP / "cpu.max").partition(" ")
    if not quota:
        quota, period = _line(CGROUP / "cpu/cpu.cfs_quota_us"), _line(CGROUP / "cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _memory_left() -> int | None:
    """In bytes; ``None`` without a limit."""
    folder, names, prefix = CGROUP, ("memory.max", "memory.current"), ""
    if not (folder / names[0]).exists():
        folder, names, prefix = CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
    limit, used = (_line(folder / name) for name in names)
    if not (limit.isdigit() and used.isdigit()):
        return None
    # Files that were read, such as weights, count as used until somebody needs the room.
    stat = _numbers(folder / "memory.stat")
    cached = sum(stat.get(f"{prefix}{name}_file", 0) for name in ("active", "inactive"))
    return max(0, int(limit) - int(used) + cached)


def _numbers(path: Path) -> dict[str, int]:
    """The lines ``name number …`` of a file; none where there's no such file."""
    lines = (line.split() for line in _text(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _line(path: Path) -> str:
    return _text(path).strip()


def _text(path: Path) -> str:
    """Of a small file; empty where it can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
