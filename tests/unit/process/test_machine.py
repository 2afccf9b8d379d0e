"""What a process may use: the machine's, or less where its cgroup says so."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from shoal.config import StageConfig
from shoal.engine import build
from shoal.process import machine
from shoal.wire.messages import Stage

doctor = importlib.import_module("shoal.cli.doctor")

CORES = len(os.sched_getaffinity(0))
MIB = 1 << 20


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cgroup that says nothing yet."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    return tmp_path


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n", encoding="ascii")


def memory_v2(limit: str, used: int, stat: str = "") -> dict[str, str]:
    return {"memory.max": limit, "memory.current": str(used), "memory.stat": stat}


def memory_v1(limit: str, used: int, stat: str = "") -> dict[str, str]:
    names = {"limit_in_bytes": limit, "usage_in_bytes": str(used), "stat": stat}
    return {f"memory/memory.{name}": text for name, text in names.items()}


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (memory_v2(str(100 * MIB), 30 * MIB), 70 * MIB),
        (memory_v1(str(100 * MIB), 30 * MIB), 70 * MIB),
        (memory_v2(str(100 * MIB), 90 * MIB, f"active_file {20 * MIB}\ninactive_file {40 * MIB}"), 70 * MIB),
        (memory_v1(str(100 * MIB), 90 * MIB, f"inactive_file 1\ntotal_inactive_file {60 * MIB}"), 70 * MIB),
        (memory_v2(str(100 * MIB), 101 * MIB), 0),
    ],
    ids=["version 2", "version 1", "read files make room", "read files make room, version 1", "none left"],
)
def test_a_cgroup_leaves_what_it_leaves(cgroup: Path, files: Mapping[str, str], left: int) -> None:
    write(cgroup, files)
    assert machine.available_memory_bytes() == left
    assert build.free_memory_bytes(torch.device("cpu")) == doctor.available_memory_bytes() == left


@pytest.mark.parametrize(
    "files", [{}, memory_v2("max", 30 * MIB), memory_v1("9223372036854771712", 30 * MIB)], ids=["none", "2", "1"]
)
def test_without_a_limit_memory_is_the_machines(cgroup: Path, files: Mapping[str, str]) -> None:
    write(cgroup, files)
    assert 256 * MIB < machine.available_memory_bytes() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "50000 100000"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu.max": "max 100000"}, CORES),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, CORES),
        ({"cpu.max": f"{CORES + 1}00000 100000"}, CORES),
        ({}, CORES),
    ],
    ids=["version 2", "version 1", "no quota", "no quota, version 1", "more than there is", "no cgroup"],
)
def test_cores_are_those_of_the_quota(cgroup: Path, files: Mapping[str, str], cores: float) -> None:
    write(cgroup, files)
    assert machine.usable_cores() == cores


@pytest.mark.parametrize(("quota", "num_threads"), [(0.5, 1), (1.0, 1), (1.9, 1), (2.0, 2), (2.7, 2)])
def test_threads_are_whole_cores(monkeypatch: pytest.MonkeyPatch, quota: float, num_threads: int) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: quota)
    assert machine.usable_threads() == num_threads


def test_a_replica_computes_with_the_containers_share(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    write(cgroup, {"cpu.max": "100000 100000"})
    build.set_num_threads(StageConfig())
    build.set_num_threads(StageConfig(num_threads=3))
    assert used == [1, 3]


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is a process' own")
def test_a_thread_steps_back_with_those_that_it_starts_and_no_others() -> None:
    before, found = niceness(), list[int]()

    def thread() -> None:
        machine.step_back(3)
        found.append(niceness())
        started = threading.Thread(target=lambda: found.append(niceness()))
        started.start()
        started.join()

    one = threading.Thread(target=thread)
    one.start()
    one.join()
    most = 19
    assert found == [min(most, before + 3)] * 2
    assert niceness() == before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is asked")
def test_where_the_system_forbids_it_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def forbid(*of: int) -> None:
        asked.append(of)
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", forbid)
    machine.step_back(3)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("given", "stage", "device", "expected"),
    [
        (None, Stage.PREFILL, "cpu", build.PREFILL_NICENESS),
        (None, Stage.DECODE, "cpu", 0),
        (None, Stage.PREFILL, "cuda", 0),
        (0, Stage.PREFILL, "cpu", 0),
        (7, Stage.DECODE, "cpu", 7),
    ],
)
def test_prefill_steps_back_where_it_shares_cores(given: int | None, stage: Stage, device: str, expected: int) -> None:
    assert build.choose_niceness(StageConfig(niceness=given), stage, torch.device(device)) == expected


ZEN_4 = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fma avx512f avx512_bf16\n"
ICE_LAKE = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fma avx512f avx512_vnni\n"
GRAVITON_3 = "processor\t: 0\nFeatures\t: fp asimd bf16\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("said", "intels", "multiplies"),
    [(ZEN_4, False, True), (ICE_LAKE, True, False), (GRAVITON_3, False, True), ("", False, False)],
    ids=["Zen 4", "Ice Lake", "Graviton 3", "nothing"],
)
def test_what_the_processor_is(monkeypatch: pytest.MonkeyPatch, said: str, intels: bool, multiplies: bool) -> None:
    monkeypatch.setattr(machine, "_text", lambda path: said)
    # Past what they keep, which is this machine's.
    assert machine.is_intels.__wrapped__() == intels
    assert machine.multiplies_bfloat16.__wrapped__() == multiplies
