"""The base dependencies suffice: whoever only asks installs neither torch nor Ray."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import shoal

SERVICES = Path(shoal.__file__).resolve().parents[1]
BASE = {"google", "grpc", "shoal", "typing_extensions"}
TAKEN_ALONG = {"grpc_health", "grpc_reflection", "grpc_tools"}
"""grpc loads these by itself wherever they are installed."""

PROGRAM = """
import json, sys
before = set(sys.modules)
import shoal.client
print(json.dumps({
    name: getattr(module, "__file__", None) for name, module in sys.modules.items() if name not in before
}))
"""


def test_the_client_loads_its_base_dependencies_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=SERVICES, timeout=120
    )
    loaded: dict[str, str | None] = json.loads(done.stdout)
    installed = sysconfig.get_path("purelib")
    foreign = {name.partition(".")[0] for name, file in loaded.items() if file and file.startswith(installed)}
    assert {"google", "grpc"} <= foreign - TAKEN_ALONG <= BASE
    assert "shoal.config" not in loaded
