"""What the rows of a step read: windows cost something only where a context is longer."""

from __future__ import annotations

import pytest
import torch

from shoal.model.kv_layout import stage_layout
from shoal.model.reads import ReadPlanner, Span

WINDOW, BLOCK = 8, 4
LAYOUT = stage_layout(
    num_layers=1, num_kept=1, num_held=1, num_kv_heads=1, head_dim=2, dtype_bytes=4, block_tokens=BLOCK
)


def rows(start: int, end: int, first_block: int = 0, stride: int = 1) -> Span:
    blocks = [first_block + stride * index for index in range(LAYOUT.num_blocks_for(end))]
    return Span(blocks, start, end)


def planner(*windows: int) -> ReadPlanner:
    return ReadPlanner(LAYOUT, torch.device("cpu"), windows)


@pytest.mark.parametrize(("start", "end"), [(0, 9), (0, 40), (5, 30), (17, 19), (8, 16), (31, 40)])
def test_a_prompts_rows_see_exactly_the_window_and_read_less_than_two_windows_at_once(start: int, end: int):
    seen: dict[int, set[int]] = {}
    segments = planner(WINDOW).plan([rows(start, end)]).within(WINDOW).prompts
    for segment in segments:
        assert isinstance(segment.context, slice)
        context = range(segment.context.start, segment.context.stop)
        assert len(context) < 2 * WINDOW
        num_rows = segment.row_end - segment.row_start
        mask = torch.ones(num_rows, len(context)).tril().bool() if segment.mask is None else segment.mask
        for row in range(num_rows):
            seen[start + segment.row_start + row] = {context[index] for index in mask[row].nonzero()[:, 0].tolist()}
    assert seen == {at: set(range(max(0, at - WINDOW + 1), at + 1)) for at in range(start, end)}


def test_decoding_rows_read_their_window_alone_and_long_contexts_are_one_group_without_a_mask():
    plan = planner(WINDOW).plan([rows(19, 20), rows(90, 91, first_block=5), rows(2, 3, first_block=40)])
    assert len(plan.groups) == 3
    long, short = plan.within(WINDOW).groups
    assert long.rows.tolist() == [0, 1] and long.longest == WINDOW and long.mask is None
    assert isinstance(long.context, torch.Tensor)
    assert long.context.tolist() == [*range(12, 20), *range(20 + 83, 20 + 91)]
    assert short.rows.tolist() == [2] and short.context == slice(160, 163)
