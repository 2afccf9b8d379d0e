"""Virtual gates, in float64 on tiny random models of every family: what a gate does, and what its gradient says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engines import exact
from models import save_tiny, tiny_model
from readings import logits_of_text
from reference import gated_logits
from torch.nn import functional as F

from shoal.errors import MalformedWeights
from shoal.model.families import FAMILIES
from shoal.model.files import locate
from shoal_lab.quality.gated import GatedModel, Gates
from shoal_lab.quality.subject import Subject, Treatment

LAYERS = 4
IDS = tuple(7 + index * 31 % 83 for index in range(24))
N = 15
PROMPT, RESPONSE = IDS[:N], IDS[N:]


def tiny(family: str) -> Any:
    return exact(tiny_model(family, layers=LAYERS))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, GatedModel]:
    return tiny(request.param), GatedModel(tiny(request.param))


def gates(prefill: float = 1.0, decode: float = 1.0) -> Gates:
    ones = torch.ones(LAYERS, dtype=torch.float64)
    return Gates(prefill * ones, decode * ones)


@torch.no_grad()
def logits_of(gated: GatedModel, ids: Sequence[int], num_prompt_tokens: int, at: Gates) -> torch.Tensor:
    """``[len(ids) - N + 1, vocab]`` after each of the tokens ``N-1..``."""
    with gated._gated(at, num_prompt_tokens, len(ids)):
        return gated._run(ids, None, len(ids) - num_prompt_tokens + 1)


def nudged(vector: str, layer: int, step: float) -> Gates:
    found = gates()
    getattr(found, vector)[layer] += step
    return found


def loss(gated: GatedModel, at: Gates) -> float:
    logits = logits_of(gated, IDS[:-1], N, at)
    return float(F.cross_entropy(logits, torch.tensor(RESPONSE), reduction="sum"))


def test_gates_at_one_are_the_plain_model(family):
    plain, gated = family
    expected = plain(torch.tensor([IDS])).logits[0, N - 1 :]
    torch.testing.assert_close(logits_of(gated, IDS, N, gates()), expected, atol=1e-12, rtol=0)


def test_token_by_token_is_the_plain_model_also_beyond_a_window(family):
    plain, gated = family
    with torch.no_grad():
        expected = plain(torch.tensor([IDS])).logits[0, N - 1 :]
    cache = gated.new_cache()
    found = [gated.next_logits(PROMPT, cache), *(gated.next_logits([token], cache) for token in RESPONSE)]
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("prefill", "decode"), [(0.5, 1.0), (1.0, 0.5), (0.5, 0.7)])
def test_a_gate_multiplies_what_is_added_to_the_residual(family, prefill: float, decode: float):
    """For Gemma that is what its norms behind attention and MLP let out: a gate before them would do nothing."""
    plain, gated = family
    at = gates(prefill, decode)
    at.prefill[1], at.decode[2] = 0.9, 0.3
    torch.testing.assert_close(logits_of(gated, IDS, N, at), gated_logits(plain, IDS, N, (at.prefill, at.decode)),
                               atol=1e-10, rtol=0)  # fmt: skip


@pytest.mark.parametrize("vector", ["prefill", "decode"])
def test_a_gradient_is_a_finite_difference(family, vector: str):
    gated = family[1]
    found = getattr(gated.gradients(PROMPT, RESPONSE), vector)
    step = 1e-5
    for layer in range(LAYERS):
        rise = loss(gated, nudged(vector, layer, step)) - loss(gated, nudged(vector, layer, -step))
        assert float(found[layer]) == pytest.approx(rise / (2 * step), rel=1e-5, abs=1e-7), layer


def test_the_last_layer_s_work_on_the_prompt_changes_nothing(family):
    found = family[1].gradients(PROMPT, RESPONSE)
    assert found.prefill[-1] == 0
    assert bool((found.prefill[:-1] != 0).all()) and bool((found.decode != 0).all())


def test_the_boundary_decides_which_tokens_a_gate_means(family):
    gated = family[1]

    def last(num_prompt_tokens: int, at: Gates) -> torch.Tensor:
        return logits_of(gated, IDS, num_prompt_tokens, at)[-1]

    assert not torch.allclose(last(10, gates(prefill=0.5)), last(N, gates(prefill=0.5)))
    torch.testing.assert_close(last(10, gates(0.5, 0.5)), last(N, gates(0.5, 0.5)))
    torch.testing.assert_close(last(1, gates(prefill=0.5)), last(1, gates()))  # one token: no prompt class
    found = gated.gradients(IDS[:1], IDS[1:])
    assert bool((found.prefill == 0).all()) and bool((found.decode != 0).all())


def test_checkpoints_keep_one_layer_s_activations_at_a_time():

    def held(*, checkpoints: bool) -> int:
        gated = GatedModel(tiny("llama"), checkpoints=checkpoints)
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gated.gradients(PROMPT, RESPONSE)
        return count

    assert held(checkpoints=True) < held(checkpoints=False) / 4


def test_prefill_gates_at_zero_are_the_shallow_plan_with_its_projection(family, tmp_path):
    plain, gated = family
    save_tiny(tmp_path, plain)
    subject = Subject.load(locate(str(tmp_path)), dtype=torch.float64, max_tokens=len(IDS))
    for num_skipped in (1, 2, 3):
        closed = gates()
        closed.prefill[LAYERS - num_skipped :] = 0
        expected = logits_of_text(subject, IDS, N, Treatment.SHALLOW, num_skipped)
        torch.testing.assert_close(logits_of(gated, IDS, N, closed), expected, atol=1e-9, rtol=1e-9)


def test_loaded_from_its_files_it_is_the_same_model(tmp_path):
    model = save_tiny(tmp_path, layers=LAYERS, tie=True)
    seen: list[tuple[int, int]] = []
    loaded = GatedModel.load(
        locate(str(tmp_path)), dtype=torch.float64, device=torch.device("cpu"), on_progress=lambda *at: seen.append(at)
    )
    expected = GatedModel(model).gradients(PROMPT, RESPONSE)
    torch.testing.assert_close(loaded.gradients(PROMPT, RESPONSE).decode, expected.decode, atol=1e-4, rtol=1e-5)
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_weights_that_are_not_finite_are_refused_before_anything_runs(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] = torch.nan
    save_tiny(tmp_path, model)
    with pytest.raises(MalformedWeights, match=r"layers\.2\.mlp\.down_proj\.weight holds NaN"):
        GatedModel.load(locate(str(tmp_path)), dtype=torch.float64, device=torch.device("cpu"))
