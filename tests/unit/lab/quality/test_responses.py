"""Responses drawn from the model itself."""

from __future__ import annotations

import pytest
import torch
from models import EOS, tiny_llama
from torch.nn import functional as F

from shoal_lab.quality.gated import GatedModel
from shoal_lab.quality.responses import draw_response

PROMPT = (5, 9, 40, 12)


@pytest.fixture(scope="module")
def gated() -> GatedModel:
    return GatedModel(tiny_llama(layers=2)[1])


def draw(gated: GatedModel, choice: int, *, seed: int = 0, max_tokens: int = 6, eos: tuple[int, ...] = ()):
    return draw_response(gated, PROMPT, choice=choice, seed=seed, max_tokens=max_tokens, eos_token_ids=eos)


def test_a_response_depends_on_seed_and_choice_alone(gated):
    first = draw(gated, 3)
    assert draw(gated, 3) == first and draw(gated, 3, max_tokens=4) == first[:4]
    assert draw(gated, 4) != first and draw(gated, 3, seed=1) != first


def test_an_end_of_text_token_ends_it_and_is_part_of_it(gated):
    first = draw(gated, 3)
    assert draw(gated, 3, eos=(EOS, first[2])) == first[: first.index(first[2]) + 1]


def test_tokens_are_drawn_as_often_as_the_model_expects(gated):
    """The whole distribution at temperature 1: the mean log-likelihood is minus the entropy, and no token is left out.

    A cut tail (top-k, top-p) or another temperature would shift it by many standard errors.
    """
    with torch.no_grad():
        logprobs = gated.model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(dim=-1)
    drawn = torch.tensor([draw(gated, choice, max_tokens=1)[0] for choice in range(600)])
    surprise = -logprobs[drawn]
    entropy = float(-(logprobs.exp() * logprobs).sum())
    error = float(surprise.std()) / len(drawn) ** 0.5
    assert abs(float(surprise.mean()) - entropy) < 3 * error
    counts = F.one_hot(drawn, len(logprobs)).sum(dim=0)
    assert float((counts / len(drawn) - logprobs.exp()).abs().max()) < 0.05
