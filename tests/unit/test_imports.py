"""What a client or the wire code imports must not bring torch, Ray or a web framework along."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import shoal

SERVICES = Path(shoal.__file__).resolve().parents[1]
HEAVY = {"torch", "ray", "nixl", "fastapi", "starlette", "uvicorn", "transformers", "numpy", "pydantic"}
DEVICE_FREE = {"torch", "ray"}


def modules_below(package: str) -> list[str]:
    """The package and the modules in it; none where there's no such package."""
    folder = SERVICES.joinpath(*package.split("."))
    return [package, *(f"{package}.{module.name}" for module in pkgutil.iter_modules([str(folder)]))]


def loaded_by(module: str) -> set[str]:
    """Top-level packages in a fresh interpreter after importing ``module``."""
    program = f"import {module}, json, sys; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SERVICES, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


LIGHT = ["shoal", "shoal.wire.messages", "shoal.errors", *modules_below("shoal.wire"), *modules_below("shoal.v1")]
PLAIN = [
    "shoal.engine.scheduler",
    "shoal.engine.blocks",
    "shoal.model.kv_layout",
    "shoal.model.plan",
    "shoal.handoff.lease",
]
MEASURING = ["shoal_lab.bench.commands", "shoal_lab.report.plots"]


@pytest.mark.parametrize("module", LIGHT)
def test_the_wire_loads_nothing_heavy(module: str) -> None:
    assert not loaded_by(module) & HEAVY


@pytest.mark.parametrize("module", PLAIN + MEASURING)
def test_decisions_and_measurements_load_neither_torch_nor_ray(module: str) -> None:
    assert not loaded_by(module) & DEVICE_FREE


GATEWAY = """
import sys
import shoal.cluster.gateway_replica
from shoal.api.tokenizer import Tokenizer
from shoal.model.files import locate
files = locate("smollm2")
files.size()
Tokenizer(files.tokenizer()).close()
sys.exit("torch" in sys.modules)
"""


def test_a_gateway_starts_without_torch() -> None:
    """It has no use for it, and would be ready seconds later."""
    done = subprocess.run([sys.executable, "-c", GATEWAY], check=False, cwd=SERVICES, timeout=120)
    assert done.returncode == 0


def test_who_deploys_needs_no_torch() -> None:
    """Ray starts seconds sooner without."""
    deploys = "import sys; from shoal.cluster import Replicas; Replicas.shipped(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", deploys], check=False, cwd=SERVICES, timeout=120).returncode == 0


READS = """
import sys
from shoal.model.files import locate
files = locate("smollm2")
assert files.spec().num_layers == 30 and files.eos_token_ids()
sys.exit("transformers.core_model_loading" in sys.modules)
"""


def test_a_plain_gguf_is_described_without_what_loads_models_in_transformers() -> None:
    """Its import takes longer than torch's."""
    assert subprocess.run([sys.executable, "-c", READS], check=False, cwd=SERVICES, timeout=120).returncode == 0


def test_a_heavy_module_would_be_noticed() -> None:
    assert "pydantic" in loaded_by("shoal.config")
