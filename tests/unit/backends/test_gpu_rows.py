"""What happens to rows on a GPU, by Triton: held against float64; and that all kernels compile for GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from triton_kernels import DEVICE, SHAPES, loaded

pytestmark = pytest.mark.triton

# The interpreter cuts bfloat16 off instead of rounding it.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
# Of what is told; GPUs' own functions of float32 lack some bits.
ROUNDED = {torch.float32: 2**-18, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(scope="module")
def kernels() -> Any:
    return loaded("gpu_rows")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    """To the nearest number of its dtype, but for what float32 rounded before."""
    off = (found.double() - exact).abs()
    assert (off <= exact.abs() * ROUNDED[found.dtype] * 0.51 + 2e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 576, 4096, 5000])
@pytest.mark.parametrize("wide_weight", [False, True])
def test_a_norm_of_a_sum(kernels: Any, dtype: torch.dtype, size: int, wide_weight: bool) -> None:
    hidden, added = random(3, size, dtype=dtype), 2 * random(3, size, dtype=dtype, seed=1)
    weight = 1 + random(size, dtype=torch.float32 if wide_weight else dtype, seed=2)
    total, normed = kernels.add_norm(hidden, added, weight, 1e-3)
    assert torch.equal(total, hidden + added)
    exact = total.double() * torch.rsqrt(total.double().square().mean(-1, keepdim=True) + 1e-3)
    assert_rounded_once(normed, exact * weight.double())
    same, alone = kernels.add_norm(total, None, weight, 1e-3)
    assert same is total
    assert_rounded_once(alone, exact * weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 80), (32, 8, 128), (1, 1, 24)])
def test_rotated_and_stored(kernels: Any, dtype: torch.dtype, num_heads: int, kv_heads: int, head_dim: int) -> None:
    rows, half = 3, head_dim // 2
    wide = random(rows, num_heads + 2 * kv_heads + 1, head_dim, dtype=dtype)  # rows are apart by a head more
    heads, given = wide[:, :-1], wide.clone()
    angles = 100 * random(rows, half, seed=3).double()
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pool = torch.full((12, 2, kv_heads, head_dim), 9.0, dtype=dtype, device=DEVICE)
    slots = torch.tensor([7, 0, 11], device=DEVICE)
    kernels.rotate_store(heads, num_heads, cos, sin, pool, slots)
    first, second = given.double()[..., :half], given.double()[..., half:]
    c, s = cos.double()[:, None], sin.double()[:, None]
    turned = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    assert_rounded_once(heads[:, :num_heads], turned[:, :num_heads])
    assert_rounded_once(pool[slots, 0], turned[:, num_heads : num_heads + kv_heads])
    assert torch.equal(pool[slots, 1], given[:, num_heads + kv_heads : -1])
    assert torch.equal(wide[:, num_heads:], given[:, num_heads:]), "only queries are turned where they are"
    others = [index for index in range(12) if index not in slots.tolist()]
    assert (pool[others] == 9).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [96, 1024, 2500])
@pytest.mark.parametrize("is_gelu", [False, True])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's: a gate that is shut
def test_gated(kernels: Any, dtype: torch.dtype, size: int, is_gelu: bool) -> None:
    gate_up = 3 * random(3, 2 * size, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = (F.gelu(gate, approximate="tanh") if is_gelu else F.silu(gate)) * up
    assert_rounded_once(kernels.gate(gate_up, is_gelu=is_gelu), exact)


def test_all_compile_for_gpus_that_are_not_here(kernels: Any, tmp_path: Path) -> None:
    """As far as their machine code; attention's products of 16 bits go to the tensor cores."""
    tests = Path(__file__).parents[2] / "support"
    paths = [str(tests), str(tests.parents[1] / "services"), os.environ.get("PYTHONPATH", "")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(tmp_path),
    }  # fmt: skip
    command = [sys.executable, str(tests / "triton_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert list(found) == list(SHAPES)
    for name, compiled in found.items():
        assert compiled.keys() == {"_attend_part", "_put_together", "_add_norm", "_rotate_store", "_gate"}
        assert all(kernel["machine_code_bytes"] for kernel in compiled.values())
        # The smallest GPUs that know bfloat16 have so much a processor.
        assert all(kernel["shared_bytes"] < 99 << 10 for kernel in compiled.values())
        assert (compiled["_attend_part"]["tensor_core_products"] > 0) == ("float32" not in name)
