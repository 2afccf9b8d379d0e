"""The doctor judges right, measures for real, and says what to do."""

from __future__ import annotations

import importlib
import socket
from pathlib import Path

import pytest

from shoal.cli.doctor import GIB, Finding, Level

doctor = importlib.import_module("shoal.cli.doctor")


@pytest.mark.parametrize(
    ("finding", "level"),
    [
        (doctor.judge_python((3, 10, 9)), Level.FAIL),
        (doctor.judge_cores(1.5), Level.WARN),
        (doctor.judge_memory(GIB), Level.FAIL),
        (doctor.judge_memory(3 * GIB), Level.WARN),
        (doctor.judge_memory(8 * GIB), Level.OK),
        (doctor.judge_shared_memory(None), Level.WARN),
        (doctor.judge_shared_memory(2 * GIB), Level.OK),
        (doctor.judge_bf16(native=False, bf16_flops=9e9, float32_flops=1e9), Level.WARN),
        (doctor.judge_bf16(native=False, bf16_flops=1e9, float32_flops=9e9, has_kernels=True), Level.OK),
        (doctor.judge_bf16(native=True, bf16_flops=1e9, float32_flops=2e9), Level.WARN),
        (doctor.judge_gpus([]), Level.OK),
        (doctor.judge_gpus([("H100", 80 * GIB)], "triton"), Level.WARN),
        (doctor.judge_kernels("no C++ compiler is at hand", fits_cpu=True), Level.WARN),
        (doctor.judge_kernels("this CPU lacks avx512f", fits_cpu=False), Level.OK),
        (doctor.judge_ray(None), Level.FAIL),
        (doctor.judge_ray("2.59.1"), Level.FAIL),
        (doctor.judge_ray("2.60.0rc1"), Level.OK),
        (doctor.judge_port(8000, free=False), Level.WARN),
    ],
    ids=lambda value: f"{value.name}: {value.what}" if isinstance(value, Finding) else str(value),
)
def test_a_finding_has_its_level_and_a_next_step_unless_all_is_well(finding: Finding, level: Level) -> None:
    assert finding.level is level
    assert bool(finding.next_step) is (level is not Level.OK)


def test_examine_looks_at_everything_and_this_machine_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_memory_bytes", lambda: 64 << 30)  # others may take it just now
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        findings = {finding.name: finding for finding in doctor.examine(ports=[port])}
    assert set(findings) == {
        "Python", "cores", "memory", "/dev/shm", "torch", "bfloat16", "GPU", "kernels", "Ray", "NIXL",
        "model smollm2", f"port {port}",
    }  # fmt: skip
    assert findings[f"port {port}"].level is Level.WARN
    assert {name: finding for name, finding in findings.items() if finding.level is Level.FAIL} == {}


def test_a_library_that_cannot_load_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_load", lambda module: None)
    failed = {finding.name for finding in doctor.examine(ports=[]) if finding.level is Level.FAIL}
    assert {"torch", "Ray", "model smollm2"} <= failed


def test_however_a_library_fails_to_load_it_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_for_another_protobuf.py").write_text("raise TypeError('Descriptors cannot be created directly')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor._load("made_for_another_protobuf") is None and doctor._load("json") is not None
