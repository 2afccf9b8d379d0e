"""Models for tests: tiny random ones, and the real one as transformers computes it."""

from __future__ import annotations

import functools
import string
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shoal.model.files import locate
from shoal.model.weights import open_weights

BOS, EOS = 0, 1
TINY_VOCAB = ["<s>", "</s>", *string.digits, *string.ascii_letters, *string.punctuation, " "]
TINY_CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ m['role'] + ':' + m['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


WINDOW = 8
# What each family's tiny model has of its own. Windows are short, heads wider than hidden / heads, caps low enough to
# bend: so that none of them can be left out unnoticed.
TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"head_dim": 24},
    "gemma2": {
        "head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": WINDOW,
        "attn_logit_softcapping": 4.0, "final_logit_softcapping": 9.0,
    },
    "gemma3_text": {
        "head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": WINDOW, "sliding_window_pattern": 3,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    },
}  # fmt: skip


def tiny_model(
    family: str,
    dtype: torch.dtype = torch.float64,
    *,
    layers: int = 6,
    hidden: int = 64,
    intermediate: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 97,
    context: int = 512,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A random model of a family in ``dtype`` whose every parameter matters: norms are not ones, biases not zeros.

    ``options`` are further values of the family's configuration, over those of ``TINY_FAMILIES``.
    """
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        bos_token_id=BOS,
        eos_token_id=EOS,
        attn_implementation="eager",
        **{**TINY_FAMILIES[family], **options},
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name:
                parameter.copy_((0 if family.startswith("gemma") else 1) + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise * (1.0 if "embed" in name else parameter.shape[-1] ** -0.5))
    return model


def tiny_llama(
    dtype: torch.dtype = torch.float64,
    *,
    tie: bool = False,
    head_dim: int | None = None,
    rope_scaling: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[LlamaConfig, LlamaForCausalLM]:
    """``tiny_model`` of the Llama family, with its configuration."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, **(rope_scaling or {})}
    model = tiny_model("llama", dtype, tie_word_embeddings=tie, head_dim=head_dim, rope_parameters=rope, **options)
    return model.config, model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character: the vocabulary of ``tiny_llama``'s 97."""
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(TINY_VOCAB)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in TINY_VOCAB[:2]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=TINY_VOCAB[BOS],
        eos_token=TINY_VOCAB[EOS],
        chat_template=TINY_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_tiny(
    folder: Path, model: LlamaForCausalLM | None = None, *, max_shard_bytes: int = 1 << 30, **options: Any
) -> LlamaForCausalLM:
    """Write a model (by default ``tiny_llama(**options)``) and its tokenizer as transformers does."""
    model = model or tiny_llama(**options)[1]
    model.save_pretrained(folder, max_shard_size=max_shard_bytes)
    tiny_tokenizer().save_pretrained(folder)
    return model


def save_tiny_gguf(
    path: Path, model: LlamaForCausalLM, kind: GGMLQuantizationType = GGMLQuantizationType.F32, **extra: Any
) -> None:
    """Write a model as llama.cpp's converter would: its names, its order of Q and K rows, matrices in ``kind``.

    ``extra`` are metadata values that are added or, with the value ``None``, left out.
    """
    config = model.config
    gemma = config.model_type == "gemma3_text"
    family = "gemma3" if gemma else "llama"
    rope = config.rope_parameters["full_attention"] if gemma else config.rope_parameters
    values = {
        f"{family}.context_length": config.max_position_embeddings,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.block_count": config.num_hidden_layers,
        f"{family}.feed_forward_length": config.intermediate_size,
        f"{family}.attention.head_count": config.num_attention_heads,
        f"{family}.attention.head_count_kv": config.num_key_value_heads,
        f"{family}.attention.key_length": config.head_dim,
        f"{family}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{family}.rope.dimension_count": config.head_dim,
        f"{family}.rope.freq_base": rope["rope_theta"],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
    }
    if gemma:
        values["gemma3.attention.sliding_window"] = config.sliding_window
    writer = GGUFWriter(path, family)
    for key, value in {**values, **extra}.items():
        _ADDERS[type(value)](writer, key, value)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            rows = _as_converted(name, tensor.float(), config).numpy()
            stored = kind if rows.ndim == 2 else GGMLQuantizationType.F32
            parts = _GGUF_GEMMA_PARTS if gemma else _GGUF_PARTS
            writer.add_tensor(_gguf_name(name, parts), quantize(rows, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_ADDERS: dict[type, Any] = {
    int: GGUFWriter.add_uint32,
    float: GGUFWriter.add_float32,
    str: GGUFWriter.add_string,
    bool: GGUFWriter.add_bool,
    list: GGUFWriter.add_array,
    type(None): lambda writer, key, value: None,
}
_GGUF_PARTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


_GGUF_GEMMA_PARTS = {
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "post_attention_layernorm": "post_attention_norm",
    **{part: its for part, its in _GGUF_PARTS.items() if part != "post_attention_layernorm"},
}  # fmt: skip


def _gguf_name(name: str, parts: dict[str, str]) -> str:
    return functools.reduce(lambda done, part: done.replace(part, parts[part]), parts, name)


def _as_converted(name: str, rows: torch.Tensor, config: Any) -> torch.Tensor:
    """As in llama.cpp's convert_hf_to_gguf.py: ``LlamaModel.permute``, and what ``Gemma3Model`` adds to norms."""
    if config.model_type == "gemma3_text":
        return rows + 1 if name.endswith("norm.weight") else rows
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    number = heads.get(name.split(".")[-2])
    if number is None:
        return rows
    return rows.reshape(number, 2, rows.shape[0] // number // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@functools.cache
def smollm2_reference(dtype: torch.dtype = torch.float32, attention: str = "eager") -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct in transformers, from the GGUF; loaded once a session and attention."""
    files = locate("smollm2")
    config = files.config()
    config._attn_implementation = attention
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad(), open_weights(files) as reader:
        for name, parameter in model.named_parameters():  # the tied lm_head comes once, as the embedding
            parameter.copy_(reader.read(name))
    return model.to(dtype)
