"""CUDA's graphs: what is asked of CUDA, in which order, where there is none; and on a GPU that they say the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import Ask, make_engine, run
from models import tiny_llama
from triton_kernels import loaded

from shoal.backends.gpu import cuda_graph
from shoal.backends.gpu.cuda_graph import CudaGraph, CudaGraphs
from shoal.backends.gpu.gpu import find_gpu_kernels
from shoal.backends.gpu.step_graph import StepGraphs
from shoal.model.families import describe


class FakeCuda:
    """``torch.cuda`` as far as it's asked, noting all of it."""

    def __init__(self, *, fails: bool = False) -> None:
        self.notes: list[str] = []
        self.now = self._stream("the caller's")
        self._fails = fails

    def Stream(self, device: torch.device) -> Any:  # noqa: N802 - torch's name
        return self._stream("the graphs'")

    def _stream(self, name: str) -> Any:
        def wait(other: Any) -> None:
            self.notes.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, device=torch.device("cuda:1"), wait_stream=wait)

    def graph_pool_handle(self) -> object:
        return "the pool"

    def CUDAGraph(self) -> Any:  # noqa: N802 - torch's name
        return SimpleNamespace(replay=lambda: self.notes.append("replay"))

    def current_stream(self) -> Any:
        return self.now

    def set_stream(self, stream: Any) -> None:
        self.now = stream

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.notes.append(f"on {device}")
        yield

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        before, self.now = self.now, stream
        self.notes.append(f"capture in {pool}, {capture_error_mode}")
        yield
        if self._fails:  # as torch's: its stream stays
            raise RuntimeError("operation not permitted when stream is capturing")
        self.now = before


def graphs_on(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> CudaGraphs:
    monkeypatch.setattr(cuda_graph, "torch", SimpleNamespace(cuda=cuda))
    return CudaGraphs(torch.device("cuda:1"))


def capture(graph: CudaGraph, cuda: FakeCuda) -> None:
    graph.capture(lambda: cuda.notes.append(f"run on {cuda.now.name}"))


def test_it_is_warmed_up_on_the_stream_that_it_is_captured_on(monkeypatch: pytest.MonkeyPatch):
    cuda = FakeCuda()
    graph = graphs_on(cuda, monkeypatch)()
    capture(graph, cuda)
    graph.replay()
    assert cuda.notes == [
        "on cuda:1",
        "the graphs' waits for the caller's",
        "run on the graphs'",
        "run on the graphs'",
        "the caller's waits for the graphs'",
        "capture in the pool, thread_local",
        "run on the graphs'",
        "replay",
    ]
    assert cuda.now.name == "the caller's"


def test_graphs_share_a_stream_and_a_pool(monkeypatch: pytest.MonkeyPatch):
    graphs = graphs_on(FakeCuda(), monkeypatch)
    assert graphs()._graphs is graphs()._graphs and graphs()._graph is not graphs()._graph


def test_a_capture_that_fails_leaves_the_callers_stream(monkeypatch: pytest.MonkeyPatch):
    cuda = FakeCuda(fails=True)
    graph = graphs_on(cuda, monkeypatch)()
    with pytest.raises(RuntimeError, match="not permitted"):
        capture(graph, cuda)
    assert cuda.now.name == "the caller's"


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
