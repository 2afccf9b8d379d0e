from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ProtocolViolation
from shoal.handoff.coverage import Coverage

TOKENS, LAYERS = (3, 15), 4
token = st.integers(1, 17)
layer = st.integers(-1, 6)


@given(st.lists(st.tuples(token, token, layer, layer), max_size=30))
def test_it_takes_what_a_grid_of_cells_would_take(rectangles: list[tuple[int, int, int, int]]) -> None:
    coverage = Coverage(*TOKENS, LAYERS)
    grid = np.zeros((LAYERS, TOKENS[1]), dtype=bool)
    for start, end, first, last in rectangles:
        fits = TOKENS[0] <= start < end <= TOKENS[1] and 0 <= first < last <= LAYERS
        if fits and not grid[first:last, start:end].any():
            coverage.add(start, end, first, last)
            grid[first:last, start:end] = True
        else:
            with pytest.raises(ProtocolViolation):
                coverage.add(start, end, first, last)
        assert coverage.num_covered == grid.sum()
    assert coverage.is_complete == grid[:, TOKENS[0] :].all()


def test_nothing_to_cover_is_complete_at_once() -> None:
    assert Coverage(5, 5, 4).is_complete


@given(st.permutations(range(12)), st.data())
def test_what_is_taken_out_again_leaves_the_rest(order: list[int], data: st.DataObject) -> None:
    coverage, grid = Coverage(0, 12, 3), np.zeros((3, 12), dtype=bool)
    for start in order:
        coverage.add(start, start + 1, 0, 3)
        grid[:, start] = True
        first, last = data.draw(st.integers(0, 11)), data.draw(st.integers(1, 12))
        if first < last and grid[1:, first:last].all():
            coverage.remove(first, last, 1, 3)
            grid[1:, first:last] = False
            if data.draw(st.booleans()):
                coverage.add(first, last, 1, 3)
                grid[1:, first:last] = True
        assert coverage.num_covered == grid.sum()
    for layer, covered in enumerate(grid):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], covered, [False]])))
        assert coverage._bounds[layer] == edges.tolist()
