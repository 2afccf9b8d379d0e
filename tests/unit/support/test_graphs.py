"""What stands in for CUDA's graphs is as blind and as strict as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import RecordedGraph


def test_a_recording_knows_no_python_and_no_new_tensor():
    values, out, added = torch.zeros(3), torch.zeros(3), [1.0]
    graph = RecordedGraph()
    graph.capture(lambda: out.copy_(values + added[0]))
    values += 5
    added[0] = 100.0
    graph.replay()
    assert out.tolist() == [6.0] * 3


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda values: values.sum().item(),
        lambda values: values.nonzero(),
        lambda values: values[values > 0],
        lambda values: torch.tensor([1.0]) + values,
        lambda values: values.unique(),
        lambda values: int(values.max()),
        lambda values: bool(values.max() > 0),
        lambda values: values.tolist(),
        lambda values: values.numpy(),
    ],
)
@pytest.mark.parametrize("is_inference", [True, False])
def test_a_recording_refuses_what_a_gpu_would(forbidden: Callable[[torch.Tensor], Any], is_inference: bool):
    with torch.inference_mode(is_inference), pytest.raises(RuntimeError, match="in a graph"):
        RecordedGraph().capture(lambda: forbidden(torch.ones(3)))
    assert torch.ones(1).item() == 1
