"""Prompts attended to by blocks of rows, as torch does it in bfloat16 on a CPU: what each row mixes, and how nearly."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from engines import divergence, kernel_model, logits_after, make_engine
from exact_attention import exact_attention
from models import tiny_model

from shoal.backends import attention
from shoal.backends.attention import BLOCK_ROWS, by_blocks
from shoal.model.batch import AttentionPlan, PromptSegment
from shoal.wire.messages import Depth

HEAD_DIM = 64
# Two blocks, and a piece of a third; with a window, no piece of a prompt is longer than that.
NUM_ROWS = 2 * BLOCK_ROWS + 9


def mask_of(num_before: int, num_rows: int, window: int | None) -> torch.Tensor:
    mask = torch.ones(num_rows, num_before + num_rows, dtype=torch.bool).tril(num_before)
    return mask if window is None else mask.triu(num_before - window + 1)


@pytest.mark.parametrize("num_before", [0, 1, BLOCK_ROWS, NUM_ROWS - 1])
@pytest.mark.parametrize("window", [None, NUM_ROWS])
@pytest.mark.parametrize(("num_heads", "kv_heads"), [(6, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_each_row_mixes_what_it_may_see(
    num_before: int, window: int | None, num_heads: int, kv_heads: int, softcap: float | None
) -> None:
    chance = torch.Generator().manual_seed(num_before + num_heads)
    queries = torch.randn(NUM_ROWS, num_heads, HEAD_DIM, generator=chance)
    kv = torch.randn(num_before + NUM_ROWS, 2, kv_heads, HEAD_DIM, generator=chance)
    mask = mask_of(num_before, NUM_ROWS, window)
    wanted = exact_attention(queries.bfloat16(), kv.bfloat16(), mask, 0.1, softcap)
    segment = PromptSegment(0, NUM_ROWS, slice(0, len(kv)), len(kv), window, mask if num_before else None)
    found = by_blocks(queries.bfloat16(), kv.bfloat16(), segment, 0.1, softcap)
    assert found.dtype is torch.bfloat16 and found.shape == queries.shape
    # A score is rounded to 8 bits of what it is, here 4 at most, and so are weights and sums.
    assert (found.double() - wanted).abs().max() < 0.03
    in_float32 = by_blocks(queries.bfloat16().float(), kv.bfloat16().float(), segment, 0.1, softcap)
    assert (in_float32.double() - wanted).abs().max() < 1e-5


def test_what_all_keys_share_costs_no_bit_of_their_scores() -> None:
    """As a bias of keys does (Qwen2): scores of hundreds differ by what bfloat16 wouldn't hold of them."""
    chance = torch.Generator().manual_seed(0)
    queries = torch.randn(NUM_ROWS, 2, HEAD_DIM, generator=chance).bfloat16()
    kv = torch.randn(NUM_ROWS, 2, 1, HEAD_DIM, generator=chance)
    kv[:, 0] += 200 * torch.randn(HEAD_DIM, generator=chance)
    kv = kv.bfloat16()
    segment = PromptSegment(0, NUM_ROWS, slice(0, NUM_ROWS), NUM_ROWS, None, None)
    wanted = exact_attention(queries, kv, mask_of(0, NUM_ROWS, None), 0.1)
    assert (by_blocks(queries, kv, segment, 0.1, None).double() - wanted).abs().max() < 0.03


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("qwen2", {}), ("gemma2", {}), ("gemma3_text", {"sliding_window": 300})]
)
@pytest.mark.parametrize("depth", list(Depth))
@pytest.mark.parametrize("max_step_tokens", [1024, 2 * BLOCK_ROWS + 5])
def test_as_near_to_float32_as_the_fused_kernel(
    family: str, options: dict[str, int], depth: Depth, max_step_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = tiny_model(family, torch.bfloat16, head_dim=HEAD_DIM, vocab=96, intermediate=128, context=1024, **options)
    prompt = [3 + index * 7 % 90 for index in range(700)]
    engines = {"num_skipped": 2, "num_blocks": 1024, "max_step_tokens": max_step_tokens}
    asked: list[int] = []

    def spy(queries: torch.Tensor, *rest: object) -> torch.Tensor:
        asked.append(len(queries))
        return by_blocks(queries, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "by_blocks", spy)
    monkeypatch.setattr(attention, "are_blocks_quicker", lambda: False)
    exactly, fused = (
        logits_after(make_engine(model, **engines), prompt, depth)  # type: ignore[arg-type]
        for model in (copy.deepcopy(rounded).float(), rounded)
    )
    assert not asked
    monkeypatch.setattr(attention, "are_blocks_quicker", lambda: True)
    ours = logits_after(make_engine(rounded, **engines), prompt, depth)  # type: ignore[arg-type]
    assert asked
    assert divergence(ours, exactly) < 2 * divergence(fused, exactly) + 1e-3


def test_short_prompts_float32_and_gradients_are_the_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "are_blocks_quicker", lambda: True)
    monkeypatch.setattr(attention, "by_blocks", lambda *_: pytest.fail("by blocks"))
    model = kernel_model("llama", torch.bfloat16)
    short = [3] * (2 * BLOCK_ROWS - 1)
    logits_after(make_engine(model, 2), short, Depth.FULL)
    logits_after(make_engine(copy.deepcopy(model).float(), 2, num_blocks=1024), short * 2, Depth.FULL)
    for of_queries in (True, False):
        queries = torch.ones(NUM_ROWS, 2, HEAD_DIM, dtype=torch.bfloat16, requires_grad=of_queries)
        kv = torch.ones(NUM_ROWS, 2, 1, HEAD_DIM, dtype=torch.bfloat16, requires_grad=not of_queries)
        segment = PromptSegment(0, NUM_ROWS, slice(0, NUM_ROWS), NUM_ROWS, None, None)
        reads = AttentionPlan(NUM_ROWS, torch.arange(NUM_ROWS), (segment,), ())
        pool = SimpleNamespace(read=lambda _, slots, kv=kv: kv[slots])
        attention.attend(queries, pool, 0, reads, scale=0.1).sum().backward()  # type: ignore[arg-type]
        assert (queries if of_queries else kv).grad is not None
