"""What must hold exactly (to rounding), in float64 on tiny random models of every family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engines import (
    Ask,
    ModelReader,
    exact,
    logits_after,
    make_engine,
    one_by_one,
    parameters_of,
    prefill_chunks,
    run,
    run_handed_off,
)  # fmt: skip
from models import WINDOW, tiny_llama, tiny_model
from reference import full_generate, pop_generate, pop_logits
from torch.nn import functional as F

from shoal.model.families import FAMILIES, ModelSpec, describe
from shoal.model.norm import rms_norm
from shoal.model.parameters import ParameterLoader
from shoal.model.plan import LayerPlan
from shoal.model.projection import KvProjection, LayerProjection
from shoal.model.rope import Rope
from shoal.wire.messages import Depth, SamplingParams, Stage

LAYERS = 6
LENGTHS = (1, 2, 3, 5, 16, 17, 33, 64)
TOLERANCE = 1e-10


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return exact(tiny_model(request.param, layers=LAYERS))


@pytest.fixture(scope="module")
def prompts(model: Any) -> list[list[int]]:
    return prompts_for(model)


def prompts_for(model: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, model.config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


def plain_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, -1]


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((ours - theirs).abs().max() < tolerance)


@pytest.mark.parametrize(("num_skipped", "depth"), [(0, Depth.SHALLOW), (0, Depth.FULL), (3, Depth.FULL)])
def test_full_depth_is_the_plain_model(model: Any, prompts: list[list[int]], num_skipped: int, depth: Depth):
    engine = make_engine(model, num_skipped)
    for prompt in prompts:
        assert close(logits_after(engine, prompt, depth), plain_logits(model, prompt))


def test_full_depth_generates_what_transformers_generates(model: Any, prompts: list[list[int]]):
    """Greedy token ids; the answers alone are longer than a window."""
    asks = [Ask(prompt, 2 * WINDOW, Depth.FULL) for prompt in prompts]
    assert run(make_engine(model, 3), asks) == [list(full_generate(model, ask.prompt, 16).token_ids) for ask in asks]


def test_skipping_one_layer_is_lossless_and_skipping_two_is_not(model: Any, prompts: list[list[int]]):
    lossless, lossy = make_engine(model, 1), make_engine(model, 2)
    for prompt in prompts[1:]:
        plain = plain_logits(model, prompt)
        assert close(logits_after(lossless, prompt, Depth.SHALLOW), plain)
        assert not close(logits_after(lossy, prompt, Depth.SHALLOW), plain, 1e-3)


@pytest.mark.parametrize("num_skipped", [0, 1, pytest.param(2, marks=pytest.mark.long), 3, 5])
def test_shallow_depth_is_the_papers_reference(model: Any, prompts: list[list[int]], num_skipped: int):
    engine = make_engine(model, num_skipped)
    for prompt in prompts:
        expected = pop_logits(model, prompt, len(prompt), num_skipped)[0]
        assert close(logits_after(engine, prompt, Depth.SHALLOW), expected)
    asks = [Ask(prompt, 12) for prompt in prompts]
    assert run(engine, asks) == [list(pop_generate(model, prompt, 12, num_skipped).token_ids) for prompt in prompts]


@pytest.mark.parametrize("num_boundary", [pytest.param(2, marks=pytest.mark.long), 5, 40])
def test_more_boundary_tokens_are_the_reference_however_the_prompt_comes(
    model: Any, prompts: list[list[int]], num_boundary: int
):
    asks = [Ask(prompt, 12) for prompt in prompts]
    expected = [list(pop_generate(model, prompt, 12, 3, num_boundary=num_boundary).token_ids) for prompt in prompts]
    for chunk in (512, 7):
        engine = make_engine(model, 3, num_boundary=num_boundary, max_step_tokens=chunk)
        assert run(engine, asks) == expected
        prefill = make_engine(model, 3, stage=Stage.PREFILL, max_step_tokens=chunk)
        assert run_handed_off(prefill, engine, asks) == expected
    tight = make_engine(model, 3, num_boundary=num_boundary, num_blocks=24)
    assert run(tight, asks) == expected and tight.counts().num_preemptions > 0


def test_as_many_boundary_tokens_as_the_prompt_has_are_the_plain_model(model: Any, prompts: list[list[int]]):
    for prompt in prompts:
        engine = make_engine(model, 3, num_boundary=len(prompt))
        assert close(logits_after(engine, prompt, Depth.SHALLOW), plain_logits(model, prompt))


def test_kept_layers_and_the_first_skipped_layer_hold_the_true_kv_and_the_second_drifts(model: Any):
    prompt = list(range(1, 40))
    num_skipped = 3
    full = pool_contents(model, 0, prompt)
    shallow = pool_contents(model, num_skipped, prompt)
    first_skipped = LAYERS - num_skipped
    for layer in range(first_skipped + 1):
        assert close(shallow[layer], full[layer]), layer
    for layer in range(first_skipped + 1, LAYERS):
        assert not close(shallow[layer], full[layer], 1e-3), layer


def pool_contents(model: Any, num_skipped: int, prompt: list[int]) -> torch.Tensor:
    """K/V of the prompt's tokens but the last in every layer, as decode's pool holds them after its own prefill."""
    engine = make_engine(model, num_skipped, block_tokens=len(prompt))
    logits_after(engine, prompt, Depth.SHALLOW)
    return engine.runner.pool.read_layers(0, LAYERS, torch.arange(len(prompt) - 1))


@pytest.mark.parametrize("chunk", [1, *(pytest.param(size, marks=pytest.mark.long) for size in (2, 4, 32)), 7, 16])
def test_chunked_is_unchunked(model: Any, prompts: list[list[int]], chunk: int):
    whole, chunked = make_engine(model, 3), make_engine(model, 3, max_step_tokens=chunk)
    for prompt in prompts:
        for depth in (Depth.SHALLOW, Depth.FULL):
            assert close(logits_after(chunked, prompt, depth), logits_after(whole, prompt, depth))


@pytest.mark.parametrize("num_skipped", [0, 1, 3])
def test_two_stages_are_one(model: Any, prompts: list[list[int]], num_skipped: int):
    """Fused = two-pass: N - 1 tokens at prefill, the boundary token at decode."""
    asks = [Ask(prompt, 10) for prompt in prompts]
    expected = run(make_engine(model, num_skipped), asks)
    for chunk in (512, 5):
        prefill = make_engine(model, num_skipped, stage=Stage.PREFILL, max_step_tokens=chunk)
        assert run_handed_off(prefill, make_engine(model, num_skipped), asks) == expected


def test_what_prefill_ships_is_what_decode_would_have_computed(model: Any):
    prompt = list(range(1, 30))
    prefill = make_engine(model, 3, stage=Stage.PREFILL, max_step_tokens=8)
    chunks = prefill_chunks(prefill, prompt)
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(0, 8), (8, 16), (16, 24), (24, 28)]
    shipped = torch.cat([chunk.kv for chunk in chunks], dim=1)
    assert close(shipped, pool_contents(model, 3, prompt))


def test_batched_is_one_by_one(model: Any, prompts: list[list[int]]):
    asks = [Ask(prompt, 12, depth) for prompt in prompts for depth in (Depth.SHALLOW, Depth.FULL)]
    for chunk in (512, 24):
        engine = make_engine(model, 3, max_step_tokens=chunk)
        assert run(engine, asks) == one_by_one(engine, asks)


@pytest.mark.parametrize("num_blocks", [24, pytest.param(30, marks=pytest.mark.long), 45])
def test_preempted_is_unpreempted(model: Any, prompts: list[list[int]], num_blocks: int):
    """A recompute runs prompt tokens shallow and generated tokens at full depth again."""
    asks = [Ask(prompt, 24, depth) for prompt in prompts for depth in (Depth.SHALLOW, Depth.FULL)]
    expected = run(make_engine(model, 3), asks)
    tight = make_engine(model, 3, num_blocks=num_blocks, max_step_tokens=40)
    assert run(tight, asks) == expected
    assert tight.counts().num_preemptions > 0


def test_preemption_after_a_hand_off_recomputes_the_same(model: Any, prompts: list[list[int]]):
    asks = [Ask(prompt, 24) for prompt in prompts]
    expected = run(make_engine(model, 3), asks)
    tight = make_engine(model, 3, num_blocks=26)
    assert run_handed_off(make_engine(model, 3, stage=Stage.PREFILL), tight, asks) == expected
    assert tight.counts().num_preemptions > 0


def project_unfolded(
    spec: ModelSpec, layers: Sequence[LayerProjection], hidden: torch.Tensor, rope: Rope
) -> torch.Tensor:
    """Layer by layer, as the paper writes it: the exact check of the folded matrix."""
    projected = []
    for layer in layers:
        normed = rms_norm(hidden, layer.norm, spec.norm_eps)
        kv = F.linear(normed, layer.kv, layer.bias).view(hidden.shape[0], 2, spec.num_kv_heads, spec.head_dim)
        if layer.k_norm is not None:
            kv[:, 0] = rms_norm(kv[:, 0], layer.k_norm, spec.norm_eps)
        rope.rotate_(kv[:, 0], layer.rope)
        projected.append(kv)
    return torch.stack(projected)


@pytest.mark.parametrize(
    ("family", "options"), [*((family, {}) for family in FAMILIES), ("llama", {"attention_bias": True})]
)
def test_one_folded_gemm_is_the_per_layer_projections(family: str, options: dict[str, Any]):
    model = tiny_model(family, layers=LAYERS, **options)
    spec, plan = describe(model.config), LayerPlan(LAYERS, 4)
    loader = ParameterLoader(ModelReader(model), spec, dtype=torch.float64, device=torch.device("cpu"))
    layers = loader.projections(plan)
    hidden = torch.randn(9, spec.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rope = Rope.at(spec, torch.arange(5, 14), torch.float64)
    assert close(KvProjection(spec, layers)(hidden, rope), project_unfolded(spec, layers, hidden, rope), 1e-12)


def test_choices_forked_after_the_boundary_step_are_single_requests(model: Any, prompts: list[list[int]]):
    """Greedy choices of one prompt all equal the single answer, through shared and then copied blocks."""
    from engines import run_choices

    for num_blocks in (256, 40):
        engine = make_engine(model, 3, num_blocks=num_blocks)
        params = SamplingParams(max_tokens=14, temperature=0.0, num_choices=3)
        for prompt in prompts[2:6]:
            single = run(make_engine(model, 3), [Ask(prompt, 14)])[0]
            assert run_choices(engine, [Ask(prompt, sampling=params)]) == [[single] * 3]


@pytest.mark.parametrize("options", [{"tie": True}, {"attention_bias": True}, {"kv_heads": 4}, {"kv_heads": 1}])
def test_variants_of_the_family_are_the_plain_model(options: dict[str, Any]):
    model = exact(tiny_llama(layers=4, **options)[1])
    engine = make_engine(model, 1)
    for prompt in prompts_for(model):
        for depth in (Depth.SHALLOW, Depth.FULL):
            assert close(logits_after(engine, prompt, depth), plain_logits(model, prompt))


def test_prefill_holds_no_deep_layer_and_no_head(model: Any):
    parameters = parameters_of(model, 2, Stage.PREFILL)
    names = [name for name, _ in parameters.tensors()]
    deep = [name for name in names if name.startswith(("layers.4.", "layers.5."))]
    assert deep == [] and "lm_head" not in names and "final_norm" not in names
    assert len(parameters.layers) == 4 and parameters.projection is not None
    spec = describe(model.config)
    kept = 4 * sum(tensor.nbytes for name, tensor in parameters.tensors() if name.startswith("layers.0."))
    projections = 2 * (2 * spec.kv_size * (spec.hidden_size + spec.qkv_bias) + spec.head_dim * spec.qk_norm) * 8
    assert parameters.num_bytes == kept + projections + parameters.embedding.nbytes
