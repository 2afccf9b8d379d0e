"""Products by torch: oneDNN's for float32, and torch's own for all that it can't do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from shoal.model.matrix import linear, onednn_linear

OUTPUTS, INPUTS = 100, 96


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    onednn_linear.cache_clear()
    yield
    onednn_linear.cache_clear()


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("missing", [None, "mkl", "mkldnn"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 300])
def test_the_product_of_float32_is_as_close_as_float32_is(
    monkeypatch: pytest.MonkeyPatch, rows: int, has_bias: bool, missing: str | None
):
    if missing is not None:
        monkeypatch.setattr(getattr(torch.backends, missing), "is_available", lambda: False)
        assert onednn_linear() is None
    inputs, weight = numbers(rows, INPUTS), numbers(OUTPUTS, INPUTS)
    bias = numbers(OUTPUTS) if has_bias else None
    right = F.linear(inputs.double(), weight.double(), None if bias is None else bias.double())
    found = linear(inputs, weight, bias)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("moved", ["inputs", "weight", "bias"])
def test_what_is_trained_gets_its_gradient(moved: str):
    parts = {"inputs": numbers(5, INPUTS), "weight": numbers(OUTPUTS, INPUTS), "bias": numbers(OUTPUTS)}
    parts[moved].requires_grad_()
    linear(**parts).square().sum().backward()
    found = parts[moved].grad
    assert found is not None
    parts[moved].grad = None
    F.linear(parts["inputs"], parts["weight"], parts["bias"]).square().sum().backward()
    torch.testing.assert_close(found, parts[moved].grad)
