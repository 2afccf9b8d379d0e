"""What the linter must not let into the package: whatever runs what was received, and checks that python -O removes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BANNED = [
    ("TID251", "import pickle\n\npickle.loads(b'')"),
    ("TID251", "from pickle import loads"),
    ("TID251", "import _pickle"),
    ("TID251", "import cloudpickle"),
    ("TID251", "import ray.cloudpickle"),
    ("TID251", "from ray import cloudpickle"),
    ("TID251", "import ray\n\nray.cloudpickle.loads(b'')"),
    ("TID251", "import jsonpickle"),
    ("TID251", "import dill"),
    ("TID251", "import joblib"),
    ("TID251", "import marshal"),
    ("TID251", "import shelve"),
    ("TID251", "import torch\n\ntorch.load('weights')"),
    ("TID251", "from torch import load"),
    ("TID251", "import torch\n\ntorch.serialization.load('weights')"),
    ("TID251", "from torch.serialization import load"),
    ("TID251", "import numpy as np\n\nnp.load('weights', allow_pickle=True)"),
    ("TID251", "import yaml\n\nyaml.load('', yaml.SafeLoader)"),
    ("TID251", "import yaml\n\nyaml.unsafe_load('')"),
    ("S307", "eval('1')"),
    ("S102", "exec('1')"),
    ("S602", "import subprocess\n\nsubprocess.run('ls', shell=True)"),
    ("S101", "assert True"),
]


def findings(code: str, path: str) -> set[str]:
    """The rules that ``code`` breaks if it stands in ``path``."""
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "--stdin-filename", path, "-"]
    ran = subprocess.run(command, check=False, input=code, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ran.returncode in (0, 1), ran.stderr
    return set(re.findall(r"^\S+:\d+:\d+: (\w+)", ran.stdout, re.MULTILINE))


@pytest.mark.parametrize(("rule", "code"), BANNED, ids=lambda value: value.splitlines()[-1])
def test_what_runs_or_trusts_input_is_found(rule: str, code: str) -> None:
    assert rule in findings(code + "\n", "services/shoal/sample.py")


def test_tests_may_use_what_the_package_may_not() -> None:
    assert not {"TID251", "S101"} & findings("import pickle\n\nassert pickle.loads(b'')\n", "tests/sample.py")


def test_the_package_makes_no_exception() -> None:
    excused = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "services").rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"noqa(?!:)|noqa:.*\b(TID251|S101|S102|S30[1-7]|S506|S602)\b", line)
    ]
    assert excused == []
