"""The kernels in each of the ways in which they multiply."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engines import emulated_kernels, native_kernels, widening_kernels

from shoal.backends.cpu.kernels import NativeKernels


@pytest.fixture(scope="module", params=["as it is", "without tiles", "emulated tiles", "widening"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeKernels]:
    """By this machine's instructions; without its matrix unit, if it has one; by one that plain code stands in for; by
    those of a processor that multiplies neither bfloat16 nor bytes."""
    kernels = native_kernels()
    compile_one = {"emulated tiles": emulated_kernels, "widening": widening_kernels}.get(request.param)
    if compile_one is not None:
        yield compile_one(tmp_path_factory.getbasetemp().parent / "kernels")  # as other processes of this run
        return
    has_tiles = kernels.use_tiles()
    if request.param == "without tiles":
        if not has_tiles:
            pytest.skip("as it is, it has none")
        assert not kernels.use_tiles(False)
    yield kernels
    assert kernels.use_tiles() == has_tiles
