"""CUDA's graphs: what is asked of CUDA, in which order, where there is none; and on a GPU that they say the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import Ask, make_engine, run
from models import tiny_llama
from triton_kernels import loaded

from shoal.backends.gpu.cuda_graph import CudaGraphs
from shoal.backends.gpu.gpu import find_gpu_kernels
from shoal.backends.gpu.step_graph import StepGraphs
from shoal.model.families import describe


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_on_a_gpu_they_say_the_same(dtype: torch.dtype):
    """Tokens in float64, where roundings choose none; that bfloat16, with other kernels, can be captured."""
    device = torch.device("cuda")
    model = tiny_llama(dtype, layers=4)[1].to(device)
    asks = [Ask([3 + index * 7 % 90 for index in range(1 + 61 * count % 290)], 4 + 5 * count) for count in range(9)]
    graphed = make_engine(model, 2, num_blocks=512, device=device, new_graph=CudaGraphs(device))
    answers = run(graphed, asks)
    graphs = graphed.runner.decode_path
    assert isinstance(graphs, StepGraphs)
    assert len({size.rows for size in graphs.sizes}) > 2, "the log says why none was captured"
    if dtype is torch.float64:
        assert answers == run(make_engine(model, 2, num_blocks=512, device=device), asks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_they_hold_triton_s_kernels():
    device = torch.device("cuda")
    model = tiny_llama(torch.float32, layers=4)[1].to(device)
    asks = [Ask([3 + index * 7 % 90 for index in range(1 + 61 * count % 290)], 4 + 5 * count) for count in range(9)]
    spec = describe(model.config)
    loaded("paged_attention")
    kernels = find_gpu_kernels(spec, torch.float32, torch.float32, device)
    options: dict[str, Any] = {"num_blocks": 512, "device": device, "kernels": kernels}
    graphed = make_engine(model, 2, new_graph=CudaGraphs(device), **options)
    assert run(graphed, asks) == run(make_engine(model, 2, **options), asks)
    assert isinstance(graphed.runner.decode_path, StepGraphs)
    assert graphed.runner.decode_path.sizes, "the log says why none was captured"
