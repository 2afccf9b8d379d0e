"""Engines with random weights in the shape of a model that isn't here."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from shoal.config import load_config
from shoal.engine.build import Served, build_engine
from shoal.engine.engine import Engine
from shoal.model.families import ModelSpec, describe
from shoal.model.files import locate
from shoal.model.kv_pool import KvPool
from shoal.model.parameters import ParameterLoader
from shoal.model.plan import LayerPlan
from shoal.wire.messages import Stage


@dataclass(frozen=True)
class Shape:
    """A model's configuration, and what is asked of it."""

    config: dict[str, Any]
    skip_layers: int
    prompt_tokens: tuple[int, int, int]
    batches: tuple[int, ...]
    context: int
    streams: tuple[int, ...]
    read_bytes: int
    product_size: int


SHAPES = {
    "llama-3.1-8b": Shape(
        {
            "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131_072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        },
        skip_layers=10, prompt_tokens=(512, 2048, 8192), batches=(1, 8), context=2048, streams=(1, 8, 32),
        read_bytes=4 << 30, product_size=8192,
    ),
    "tiny": Shape(
        {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
        },
        skip_layers=2, prompt_tokens=(16, 32, 64), batches=(1, 3), context=40, streams=(1, 3),
        read_bytes=16 << 20, product_size=256,
    ),
}  # fmt: skip


class RandomReader:
    """A model's tensors as a weight file would give them, made on ``device`` when asked for."""

    names: frozenset[str] = frozenset()

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        hidden, inner, vocab = spec.hidden_size, spec.intermediate_size, spec.vocab_size
        self._shapes = {
            "embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "q_proj": (spec.q_size, hidden),
            "k_proj": (spec.kv_size, hidden), "v_proj": (spec.kv_size, hidden), "o_proj": (hidden, spec.q_size),
            "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
        }  # fmt: skip
        self._norm = torch.ones(hidden, dtype=dtype, device=device)

    def read(self, name: str) -> torch.Tensor:
        shape = self._shapes.get(name.split(".")[-2])
        if shape is None:
            return self._norm
        return torch.randn(shape, dtype=self._norm.dtype, device=self._norm.device).mul_(shape[1] ** -0.5)


def make_engine(shape: Shape, dtype: torch.dtype, device: torch.device, max_step_tokens: int) -> Engine:
    """Decode's, whose pool holds random numbers and has a spare slot."""
    most = max(max(shape.batches) * max(shape.prompt_tokens), max(shape.streams) * (shape.context + 1024))
    limits = {
        "num_blocks": most // 16 + 2 * max(shape.streams) + 16, "max_sequences": max(shape.streams),
        "max_step_tokens": max_step_tokens, "target_step_s": 600.0, "kernels": "torch",
    }  # fmt: skip
    config = load_config(model={"skip_layers": shape.skip_layers, "projector": "paper"}, decode=limits)
    with tempfile.TemporaryDirectory() as folder:
        values = LlamaConfig(**shape.config, rms_norm_eps=1e-5, tie_word_embeddings=False)
        values.save_pretrained(folder)
        spec, plan = describe(values), LayerPlan(values.num_hidden_layers, shape.skip_layers)
        served = Served(locate(folder), spec, plan, dtype, dtype, None, "random", "random", spec.max_context_tokens)
        reader = RandomReader(spec, dtype, device)
        parameters = ParameterLoader(reader, spec, dtype=dtype, device=device).load(plan, Stage.DECODE)
        engine = build_engine(config, Stage.DECODE, served, parameters, device=device)
    runner = engine.runner
    if not runner.pool.has_spare_slot:
        pool = runner.pool
        runner.pool = KvPool(pool.layout, pool.num_blocks, dtype=dtype, device=device, has_spare_slot=True)
        runner.decode_path = None  # it knows the one before
    for layer in runner.pool.layers:
        layer.normal_()
    return engine
