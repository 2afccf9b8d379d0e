"""Ridge regression towards a given matrix, from sums that text streams into."""

from __future__ import annotations

import pytest
import torch

from shoal.errors import CalibrationError
from shoal_lab.quality.normal_equations import NormalEquations

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(200, 6, generator=GENERATOR, dtype=torch.float64)
TRUE = torch.randn(4, 6, generator=GENERATOR, dtype=torch.float64)
PRIOR = torch.randn(4, 6, generator=GENERATOR, dtype=torch.float64)
Y = X @ TRUE.T + 0.1 * torch.randn(200, 4, generator=GENERATOR, dtype=torch.float64)


def sums(x: torch.Tensor = X, y: torch.Tensor = Y, rows: int = 200, columns: int = 4) -> NormalEquations:
    """Of blocks of so many rows, and so many columns at a time."""
    found = NormalEquations(6, 4)
    for start in range(0, len(x), rows):
        block = slice(start, start + rows)
        found.add_inputs(x[block])
        for first in range(0, 4, columns):
            found.add_outputs(x[block], first, y[block, first : first + columns])
    return found


def test_without_ridge_it_is_least_squares():
    expected = torch.linalg.lstsq(X, Y).solution.T
    torch.testing.assert_close(sums().solve(PRIOR, 0.0), expected)


def test_the_gradient_of_what_it_minimises_is_zero():
    found, weight = sums().solve(PRIOR, 0.3), 0.3 * (X.T @ X).diagonal().mean()
    gradient = (X @ found.T - Y).T @ X + weight * (found - PRIOR)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (37, 4), (200, 1), (64, 3)])
def test_blocks_add_up_to_the_whole(rows: int, columns: int):
    found = sums(rows=rows, columns=columns)
    assert found.num_rows == 200
    torch.testing.assert_close(found.solve(PRIOR, 0.1), sums().solve(PRIOR, 0.1))


def test_too_few_rows_without_ridge_are_an_error():
    with pytest.raises(CalibrationError, match="too little text"):
        sums(X[:3], Y[:3]).solve(PRIOR, 0.0)


def test_numbers_that_are_not_finite_are_an_error():
    broken = X.clone()
    broken[5, 2] = float("nan")
    with pytest.raises(CalibrationError, match="aren't finite"):
        sums(broken).solve(PRIOR, 0.1)
