"""What a model says of given text under each treatment, held against transformers and the plain reference."""

from __future__ import annotations

import functools

import pytest
import torch
from engines import native_kernels
from models import save_tiny, tiny_model
from readings import logits_of_text
from reference import pop_logits

from shoal.backends.cpu.native_layers import NativeLayers
from shoal.errors import InvalidRequest
from shoal.model.files import locate
from shoal_lab.quality.subject import Subject, Treatment

IDS = tuple(7 + index * 31 % 83 for index in range(60))
OPTIONS = {
    Treatment.SHALLOW: {},
    Treatment.NO_PROJECTION: {"project": False},
    Treatment.NO_BOUNDARY: {"boundary": False},
    Treatment.REMOVED: {"remove_everywhere": True},
}

close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny(folder, dtype=torch.float64, attention_bias=True)
    return model, Subject.load(locate(str(folder)), dtype=torch.float64, max_tokens=64)


@pytest.mark.parametrize("num_skipped", [1, 2, 4])
@pytest.mark.parametrize("treatment", OPTIONS)
def test_a_treatment_is_the_reference_s(tiny, treatment: Treatment, num_skipped: int):
    model, subject = tiny
    found = logits_of_text(subject, IDS, 40, treatment, num_skipped)
    close(found, pop_logits(model, IDS, 40, num_skipped, **OPTIONS[treatment]))


def test_full_depth_is_the_model(tiny):
    model, subject = tiny
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0, 39:]
    close(logits_of_text(subject, IDS, 40, Treatment.FULL), expected)


@pytest.mark.parametrize(("num_ids", "num_prompt"), [(65, 40), (10, 0), (10, 11)])
def test_text_that_can_not_be_asked_about_is_refused(tiny, num_ids: int, num_prompt: int):
    with pytest.raises(InvalidRequest):
        logits_of_text(tiny[1], (5,) * num_ids, num_prompt, Treatment.SHALLOW)


@torch.inference_mode()
def test_what_is_evaluated_are_the_kernels_that_serve(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Its weights are packed beside the loaded ones, of which projections are still made."""
    native_kernels()
    save_tiny(tmp_path, tiny_model("llama", torch.bfloat16, head_dim=64, hidden=128, intermediate=256))
    subject = Subject.load(locate(str(tmp_path)), dtype=torch.bfloat16, max_tokens=64)
    asked = []
    run_layers = NativeLayers.__call__

    def watched(layers, *of):
        out = run_layers(layers, *of)
        asked.append(out is not None)
        return out

    monkeypatch.setattr(NativeLayers, "__call__", watched)
    assert subject.go_on(IDS, 40, 0).isfinite().all()
    assert asked and all(asked)
    assert isinstance(subject.parameters.layers[0].qkv, torch.Tensor)
    assert len(subject.projections(2)) == 2
