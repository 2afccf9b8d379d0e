"""The reference itself: held against the plain model, exactly, on tiny random float64 models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import full_generate, pop_generate, pop_logits, token_nlls
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

NUM_LAYERS = 5
# transformers' norms and rotary table are computed in float32, whatever the model's dtype.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=NUM_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def random_ids(num_tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 97, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain_logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("num_skipped", [0, 1])
@pytest.mark.parametrize("num_prompt_tokens", [1, 2, 17, 40])
def test_skipping_none_or_one_layer_equals_the_plain_model(model: Any, num_skipped: int, num_prompt_tokens: int):
    ids = random_ids(40)
    expected = plain_logits(model, ids)[num_prompt_tokens - 1 :]
    assert apart(pop_logits(model, ids, num_prompt_tokens, num_skipped), expected) < TOLERANCE


@pytest.mark.parametrize("num_skipped", [2, 3, NUM_LAYERS])
def test_skipping_more_differs_from_the_plain_model(model: Any, num_skipped: int):
    ids = random_ids(40)
    assert apart(pop_logits(model, ids, 30, num_skipped), plain_logits(model, ids)[29:]) > 1e-2


@pytest.mark.parametrize("num_skipped", range(NUM_LAYERS + 1))
def test_a_one_token_prompt_is_full_depth(model: Any, num_skipped: int):
    ids = random_ids(12)
    assert apart(pop_logits(model, ids, 1, num_skipped), plain_logits(model, ids)) < TOLERANCE


@pytest.mark.parametrize("num_skipped", [0, 1, 3])
def test_given_all_at_once_equals_step_by_step(model: Any, num_skipped: int):
    prompt = random_ids(23)
    generated = pop_generate(model, prompt, 16, num_skipped)
    logits = pop_logits(model, [*prompt, *generated.token_ids[:-1]], len(prompt), num_skipped)
    assert logits.argmax(dim=-1).tolist() == list(generated.token_ids)
    best = logits.topk(2).values
    assert generated.gaps == pytest.approx((best[:, 0] - best[:, 1]).tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("num_skipped", [0, 1])
def test_generation_equals_transformers_own(model: Any, num_skipped: int):
    for seed, num_tokens in enumerate([1, 2, 9, 50]):
        prompt = random_ids(num_tokens, seed)
        ours, theirs = pop_generate(model, prompt, 20, num_skipped), full_generate(model, prompt, 20)
        assert ours.token_ids == theirs.token_ids
        assert ours.gaps == pytest.approx(theirs.gaps, abs=TOLERANCE)


def test_generation_ends_with_the_eos_token_it_is_given_and_with_no_other(model: Any):
    prompt = random_ids(9)
    whole = full_generate(model, prompt, 20).token_ids
    eos = whole[6]
    expected = whole[: whole.index(eos) + 1]
    model.generation_config.eos_token_id = eos
    try:
        assert full_generate(model, prompt, 20).token_ids == whole
    finally:
        model.generation_config.eos_token_id = None
    assert full_generate(model, prompt, 20, eos_token_ids=[eos]).token_ids == expected
    assert pop_generate(model, prompt, 20, 0, eos_token_ids=[eos]).token_ids == expected


def test_layers_removed_everywhere_equals_a_model_without_them(model: Any):
    ids = random_ids(30)
    expected_layers = model.model.layers
    model.model.layers = expected_layers[: NUM_LAYERS - 2]
    try:
        shorter = pop_logits(model, ids, 20, 0)
    finally:
        model.model.layers = expected_layers
    assert apart(pop_logits(model, ids, 20, 2, remove_everywhere=True), shorter) < TOLERANCE
    assert apart(pop_logits(model, ids, 20, 0, remove_everywhere=True), plain_logits(model, ids)[19:]) < TOLERANCE


def test_without_a_boundary_token_nothing_changes_at_depth_zero_and_the_first_row_is_shallow(model: Any):
    ids = random_ids(30)
    assert apart(pop_logits(model, ids, 20, 0, boundary=False), plain_logits(model, ids)[19:]) < TOLERANCE
    shallow = pop_logits(model, ids, 20, 2, remove_everywhere=True)
    without = pop_logits(model, ids, 20, 2, boundary=False)
    assert apart(without[:1], shallow[:1]) < TOLERANCE
    assert apart(without[1:], shallow[1:]) > 1e-2


def test_without_projection_the_skipped_layers_see_only_the_suffix(model: Any):
    """Checked where it can be computed by other means: every layer skipped, so the prompt leaves no trace at all
    but the positions, and RoPE sees only differences of positions."""
    ids = random_ids(30)
    without = pop_logits(model, ids, 20, NUM_LAYERS, project=False)
    assert apart(without, plain_logits(model, ids[19:])) < 1e-5
    assert apart(without, pop_logits(model, ids, 20, NUM_LAYERS)) > 1e-2


def test_nlls_are_of_the_token_that_each_row_predicts(model: Any):
    ids = random_ids(25)
    nlls = token_nlls(pop_logits(model, ids, 20, 0), ids[20:])
    labels = torch.tensor([[-100] * 20 + ids[20:]])
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=labels).loss
    assert len(nlls) == 5
    assert float(nlls.mean()) == pytest.approx(float(loss), abs=1e-5)
