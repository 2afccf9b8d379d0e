"""CUDA graphs: what a GPU is asked to do, recorded once and started as one."""

from __future__ import annotations

from collections.abc import Callable

import torch


class CudaGraphs:
    """Makes graphs of one device, to be replayed one at a time: they are captured on one ``stream``, and share one
    memory ``pool`` for what they use in between, so that all together need no more of it than the largest."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self) -> CudaGraph:
        return CudaGraph(self)


class CudaGraph:
    """Carries out ``Graph`` (backends/gpu/step_graph.py); replayed on the caller's stream."""

    def __init__(self, graphs: CudaGraphs) -> None:
        self._graphs = graphs
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], None]) -> None:
        """Runs it twice before, on the same stream: what a library allocates or chooses when first called can't be
        recorded. Raises RuntimeError."""
        stream = self._graphs.stream
        with torch.cuda.device(stream.device):
            current = torch.cuda.current_stream()
            try:
                stream.wait_stream(current)
                try:
                    with torch.cuda.stream(stream):
                        run()
                        run()
                finally:
                    current.wait_stream(stream)  # it may still read what is given back when ``run`` has failed
                # Of this thread alone: others may allocate and wait meanwhile, as K/V arrive and are copied.
                with torch.cuda.graph(
                    self._graph, pool=self._graphs.pool, stream=stream, capture_error_mode="thread_local"
                ):
                    run()
            finally:
                torch.cuda.set_stream(current)  # a capture that fails leaves its own

    def replay(self) -> None:
        self._graph.replay()
