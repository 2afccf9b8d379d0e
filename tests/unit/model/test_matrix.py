"""Products by torch: oneDNN's for float32, and torch's own for all that it can't do."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import Mock

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


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """It takes note of what oneDNN would be asked for, and torch computes it."""
    asked = Mock(side_effect=F.linear)
    monkeypatch.setattr("shoal.model.matrix.onednn_linear", lambda: asked)
    return asked


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


@pytest.mark.parametrize("weight", ["a part", "turned"])
def test_rows_and_weights_may_lie_in_others(weight: str):
    inputs = numbers(6, 2 * INPUTS)[::2, INPUTS:]
    lying = numbers(OUTPUTS, 2 * INPUTS)[:, :INPUTS] if weight == "a part" else numbers(INPUTS, OUTPUTS).T
    torch.testing.assert_close(linear(inputs, lying, None), inputs @ lying.T, rtol=1e-5, atol=1e-4)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_onednn_is_asked_for_float32_alone(by_onednn: Mock, dtype: torch.dtype):
    inputs, weight = numbers(5, INPUTS, dtype=dtype), numbers(OUTPUTS, INPUTS, dtype=dtype)
    assert linear(inputs, weight, None).equal(F.linear(inputs, weight))
    assert by_onednn.called == (dtype is torch.float32)


@pytest.mark.parametrize("intels", [False, True])
@pytest.mark.parametrize(("rows", "is_mkls"), [(1, True), (2, True), (3, False), (64, False), (65, True), (300, True)])
def test_mkl_is_asked_where_it_is_quicker(
    by_onednn: Mock, monkeypatch: pytest.MonkeyPatch, rows: int, is_mkls: bool, intels: bool
):
    monkeypatch.setattr("shoal.model.matrix.is_intels", lambda: intels)
    linear(numbers(rows, INPUTS), numbers(OUTPUTS, INPUTS), None)
    assert by_onednn.called == (not (intels and is_mkls))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_onednn_is_asked_where_nothing_is_trained(by_onednn: Mock, mode: type[torch.no_grad | torch.inference_mode]):
    with mode():
        linear(numbers(5, INPUTS), numbers(OUTPUTS, INPUTS), None)
    assert by_onednn.called


def test_onednn_is_there_on_the_usual_machine():
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        pytest.skip("this torch was built without MKL or oneDNN")
    assert onednn_linear() is not None
