"""The Triton kernel for tests: compiled where there is a GPU, elsewhere carried out by Triton's interpreter.

As a program, it compiles the kernel for GPUs that aren't there, as far as their machine code, and prints what came out.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import tools

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {
    # Compute capability, dtype, numbers of a head, query and K/V heads, whether contexts are in one run, softcap.
    "SmolLM2 on an A100": (80, torch.bfloat16, 64, 9, 3, False, None),
    "Llama 3.1 8B on an H100": (90, torch.bfloat16, 128, 32, 8, False, None),
    "Llama 3.1 8B, in one run": (90, torch.bfloat16, 128, 32, 8, True, None),
    "Gemma 2 on a B200": (100, torch.bfloat16, 256, 8, 4, False, 50.0),
    "float32 on an H100": (90, torch.float32, 64, 9, 3, False, None),
}


@contextmanager
def loaded_kernel() -> Iterator[Any]:
    """The module; skips the test where Triton isn't there. What carries it out is decided as it's first imported, which
    nothing else in the tests does."""
    with pytest.MonkeyPatch.context() as patch:
        if (folder := tools.triton()) is not None:
            patch.syspath_prepend(str(folder))
        if DEVICE.type == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("shoal.kernels.paged_attention")


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

    def __init__(self, kernel: Any, compiled: list[Any]) -> None:
        self._kernel = kernel
        self._compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given: self._compiled.append(self._kernel.warmup(*given, grid=grid))


def _compile_all() -> dict[str, list[dict[str, int]]]:
    from triton.runtime import driver

    from shoal.kernels import paged_attention

    found, compiled = {}, list[Any]()
    for name in ("_attend_part", "_put_together"):
        setattr(paged_attention, name, _Compiles(getattr(paged_attention, name), compiled))
    for name, (capability, dtype, head_dim, num_heads, kv_heads, is_run, softcap) in SHAPES.items():
        driver.set_active(_Driver(capability))
        compiled.clear()
        queries = torch.zeros(2, num_heads, head_dim, dtype=dtype)
        kv = torch.zeros(32, 2, kv_heads, head_dim, dtype=dtype)
        rows, context = torch.arange(2), slice(0, 32) if is_run else torch.arange(32)
        paged_attention.attend_rows(
            queries, rows, kv, context, 16, rows + 15, torch.empty_like(queries), scale=0.1, softcap=softcap
        )
        found[name] = [
            {
                "shared_bytes": kernel.metadata.shared,
                "tensor_core_products": kernel.asm["ptx"].count("mma.sync"),
                "machine_code_bytes": len(kernel.asm["cubin"]),
            }
            for kernel in compiled
        ]
    return found


if __name__ == "__main__":
    print(json.dumps(_compile_all()))
