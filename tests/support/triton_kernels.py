"""The Triton kernels for tests: compiled where there is a GPU, elsewhere carried out by Triton's interpreter.

As a program, it compiles them for GPUs that aren't there, as far as their machine code, and prints what came out.
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Shape:
    """Of a model on a GPU of a compute ``capability``; ``is_run``: contexts are in one run."""

    capability: int
    dtype: torch.dtype
    head_dim: int
    num_heads: int
    kv_heads: int
    is_run: bool = False
    softcap: float | None = None


SHAPES = {
    "SmolLM2 on an A100": Shape(80, torch.bfloat16, 64, 9, 3),
    "Llama 3.1 8B on an H100": Shape(90, torch.bfloat16, 128, 32, 8),
    "Llama 3.1 8B, in one run": Shape(90, torch.bfloat16, 128, 32, 8, is_run=True),
    "Gemma 2 on a B200": Shape(100, torch.bfloat16, 256, 8, 4, softcap=50.0),
    "float32 on an H100": Shape(90, torch.float32, 64, 9, 3),
}


def loaded(name: str) -> Any:
    """That module of shoal.backends.gpu; skips the test where it can't be. What carries kernels out is decided once in
    a process, as Triton is first imported: so tests of them are marked ``triton``, and run by themselves (Makefile)."""
    if find_spec("triton") is None:
        pytest.skip("Triton isn't here: run `make tools`, and tests of it as `make test` does")
    if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is no GPU, and TRITON_INTERPRET isn't 1")
    return importlib.import_module(f"shoal.backends.gpu.{name}")


class _Driver:
    """That of a GPU that isn't there, as far as a compiler asks."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiles:
    """Stands in for a kernel: compiles what would be started."""

    def __init__(self, name: str, kernel: Any, compiled: dict[str, Any]) -> None:
        self._name = name
        self._kernel = kernel
        self._compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*given: Any, **options: Any) -> None:
            self._compiled[self._name] = self._kernel.warmup(*given, grid=grid, **options)

        return start


def _compile_all() -> dict[str, dict[str, dict[str, int]]]:
    from triton.runtime import driver

    found, compiled = {}, dict[str, Any]()
    for module, names in _KERNELS.items():
        for name in names:
            setattr(module, name, _Compiles(name, getattr(module, name), compiled))
    for name, shape in SHAPES.items():
        driver.set_active(_Driver(shape.capability))
        compiled.clear()
        _start_all(shape)
        found[name] = {
            kernel: {
                "shared_bytes": made.metadata.shared,
                "tensor_core_products": made.asm["ptx"].count("mma.sync"),
                "machine_code_bytes": len(made.asm["cubin"]),
            }
            for kernel, made in compiled.items()
        }
    return found


def _start_all(shape: Shape) -> None:
    """What a step starts, of two rows."""
    dtype, head_dim, num_heads, kv_heads = shape.dtype, shape.head_dim, shape.num_heads, shape.kv_heads
    heads = torch.zeros(2, num_heads + 2 * kv_heads, head_dim, dtype=dtype)
    kv = torch.zeros(32, 2, kv_heads, head_dim, dtype=dtype)
    rows, context = torch.arange(2), slice(0, 32) if shape.is_run else torch.arange(32)
    angles = torch.zeros(2, head_dim // 2, dtype=dtype)
    hidden = torch.zeros(2, num_heads * head_dim, dtype=dtype)
    gpu_rows.add_norm(hidden, hidden, hidden[0], 1e-5)
    gpu_rows.rotate_store(heads, num_heads, angles, angles, kv, rows)
    queries = heads[:, :num_heads]
    paged_attention.attend_rows(
        queries, rows, kv, context, 16, rows + 15, torch.empty_like(queries), scale=0.1, softcap=shape.softcap
    )
    gpu_rows.gate(torch.zeros(2, 6 * hidden.shape[1], dtype=dtype), is_gelu=shape.softcap is not None)


if __name__ == "__main__":
    from shoal.backends.gpu import gpu_rows, paged_attention

    _KERNELS = {paged_attention: ("_attend_part", "_put_together"), gpu_rows: ("_add_norm", "_rotate_store", "_gate")}
    print(json.dumps(_compile_all()))
