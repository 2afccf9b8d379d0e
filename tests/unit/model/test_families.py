"""What each family's configuration may say, and that the decoder then computes what transformers does."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import exact, logits_after, make_engine
from models import WINDOW, save_tiny, save_tiny_gguf, tiny_model
from readings import logits_of_text
from reference import pop_logits
from transformers import AutoConfig

from shoal.errors import UnsupportedModel
from shoal.model.decoder import Decoder
from shoal.model.families import FAMILIES, describe
from shoal.model.files import locate
from shoal.model.norm import rms_norm
from shoal.wire.messages import Depth
from shoal_lab.quality.subject import Subject, Treatment

IDS = tuple(7 + index * 31 % 83 for index in range(4 * WINDOW))
BOTH_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": LLAMA3}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"head_dim": 24}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True}),
    ("gemma3_text", {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 9.0}),
    ("gemma3_text", {"rope_parameters": BOTH_BASES, "tie_word_embeddings": False}),
    ("gemma3_text", {"layer_types": ["sliding_attention"] * 4}),
    ("gemma3_text", {"layer_types": ["full_attention"] * 4}),
]

ROOT = Path(__file__).parents[3]


def forward(model: Any, ids: tuple[int, ...] = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_what_a_configuration_may_say_is_run_as_transformers_runs_it(family: str, options: dict[str, Any]):
    model = exact(tiny_model(family, layers=4, **options))
    engine = make_engine(model, 2)
    torch.testing.assert_close(logits_after(engine, list(IDS), Depth.FULL), forward(model)[-1], atol=1e-10, rtol=0)
    shallow = pop_logits(model, IDS, len(IDS), 2)[0]
    torch.testing.assert_close(logits_after(engine, list(IDS), Depth.SHALLOW), shallow, atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_says_after_every_token_what_transformers_own_forward_says(family: str, tmp_path: Path):
    """In float32 and with nothing of transformers replaced: its norms, its eager attention."""
    model = save_tiny(tmp_path, tiny_model(family, torch.float32, layers=4))
    subject = Subject.load(locate(str(tmp_path)), dtype=torch.float32, max_tokens=len(IDS))
    found = logits_of_text(subject, IDS, 1, Treatment.FULL)
    torch.testing.assert_close(found, forward(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("treatment", "options"),
    [
        (Treatment.SHALLOW, {}),
        (Treatment.NO_PROJECTION, {"project": False}),
        (Treatment.NO_BOUNDARY, {"boundary": False}),
        (Treatment.REMOVED, {"remove_everywhere": True}),
    ],
)
def test_every_treatment_of_every_family_is_the_references(
    family: str, treatment: Treatment, options: dict[str, bool], tmp_path: Path
):
    model = exact(save_tiny(tmp_path, tiny_model(family)))
    subject = Subject.load(locate(str(tmp_path)), dtype=torch.float64, max_tokens=len(IDS))
    found = logits_of_text(subject, IDS, 20, treatment, 3)
    torch.testing.assert_close(found, pop_logits(model, IDS, 20, 3, **options), atol=1e-10, rtol=0)


def test_gemma_3_from_a_gguf_is_the_model_that_was_converted(tmp_path: Path):
    """Its window pattern and its local RoPE base are every Gemma 3's: the file doesn't hold them."""
    bases = {"sliding_attention": {"rope_theta": 10_000.0}, "full_attention": {"rope_theta": 1_000_000.0}}
    options = {"sliding_window_pattern": 6, "query_pre_attn_scalar": 24, "rope_parameters": bases}
    model = tiny_model("gemma3_text", torch.float32, layers=7, **options)
    save_tiny_gguf(tmp_path / "tiny.gguf", model)
    subject = Subject.load(locate(str(tmp_path / "tiny.gguf")), dtype=torch.float32, max_tokens=len(IDS))
    expected = describe(model.config)
    assert replace(subject.spec, norm_eps=expected.norm_eps) == expected  # it's float32 in the file
    assert subject.spec.norm_eps == pytest.approx(expected.norm_eps)
    found = logits_of_text(subject, IDS, 1, Treatment.FULL)
    torch.testing.assert_close(found, forward(model), atol=1e-4, rtol=1e-4)


def test_the_guide_names_every_family_and_shows_a_file_as_it_is():
    guide = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    assert [name for name in FAMILIES if f"| `{name}` |" not in guide] == []
    (shown,) = re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    assert shown in (ROOT / "services/shoal/model/families/mistral.py").read_text(encoding="utf-8")


def test_gemmas_norms_and_embedding_scale_are_transformers_in_bfloat16():
    """Where rounding tells float32 arithmetic from bfloat16's: to the last bit of nearly all values."""
    model = tiny_model("gemma3_text", torch.bfloat16, layers=1, hidden=72)
    parameters = make_engine(model, 0).runner.decoder.parameters
    hidden = torch.randn(64, 72, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    norm = model.model.layers[0].input_layernorm
    ours, theirs = rms_norm(hidden, parameters.layers[0].input_norm, norm.eps), norm(hidden)
    assert ours.dtype == torch.bfloat16 and (ours == theirs).float().mean() > 0.999
    decoder: Decoder = make_engine(model, 0).runner.decoder
    ids = torch.tensor(IDS)
    assert torch.equal(decoder.embed(ids), model.model.embed_tokens(ids))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt2", {}, "gpt2.*gemma2, gemma3_text, llama, mistral, qwen2, qwen3"),
        ("llama", {"hidden_act": "gelu"}, "'gelu'.*'silu'"),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 3}, "8 heads can't share 3 K/V heads"),
        ("qwen2", {"num_key_value_heads": 0}, "can't share 0 K/V heads"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic.*llama3"),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2]}}, "M-RoPE"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention.*sliding_attention"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "sliding_window is None"),
        ("mistral", {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_what_is_not_run_is_refused_by_name(family: str, options: dict[str, Any], message: str):
    with pytest.raises(UnsupportedModel, match=message):
        describe(AutoConfig.for_model(family, num_hidden_layers=2, **options))
