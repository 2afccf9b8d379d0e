"""What a GGUF file's metadata say about the shape of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.errors import MalformedWeights, UnsupportedModel
from shoal.model.tensor_file import TensorFile

CONTROL = 3  # of gguf's TokenType
# Llama 3's, those of ChatML (SmolLM2) and Gemma's.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>")


class GgufValues:
    """Looks up the metadata of a file's own architecture (``llama.*``), checked. Raises ModelError."""

    def __init__(self, file: TensorFile) -> None:
        self.file = file
        self._metadata: Mapping[str, Any] = file.metadata
        self.architecture = str(file.metadata.get("general.architecture"))

    def refuse_variants(self) -> None:
        """Mixtures of experts, and files that are one part of a model."""
        if self._metadata.get(f"{self.architecture}.expert_count"):
            raise UnsupportedModel(f"{self.file.path} is a mixture of experts; only dense models are supported")
        if self._metadata.get("split.count", 1) not in (0, 1):
            raise UnsupportedModel(f"{self.file.path} is one part of several: join them with llama-gguf-split --merge")

    def count(self, key: str, default: int | None = None) -> int:
        value = self._metadata.get(f"{self.architecture}.{key}", default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise MalformedWeights(
                f"{self.file.path}: {self.architecture}.{key} is {value!r}, it must be a positive integer"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._metadata.get(f"{self.architecture}.{key}", default)
        if type(value) is not float or not 0 < value < float("inf"):
            raise MalformedWeights(
                f"{self.file.path}: {self.architecture}.{key} is {value!r}, it must be a positive number"
            )
        return value

    def vocab_size(self) -> int:
        """What the embedding has; a padded vocabulary has more rows than tokens."""
        embedding = self.file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise MalformedWeights(f"{self.file.path}: the embedding token_embd.weight is missing or no matrix")
        return embedding.shape[0]

    def rope(self) -> dict[str, Any]:
        """Linear scaling or none: ``rope_freqs`` (Llama 3.1) doesn't tell which parameters it was made from. Where the
        kind isn't named, as in older files, a factor is a linear one's, as llama.cpp has it."""
        factors = ("rope.scaling.factor", "rope.scale_linear")
        key = next((key for key in factors if f"{self.architecture}.{key}" in self._metadata), factors[0])
        scales = self._metadata.get(f"{self.architecture}.{key}", 0) not in (0, 1)
        scaling = self._metadata.get(f"{self.architecture}.rope.scaling.type", "linear" if scales else "none")
        if "rope_freqs.weight" in self.file.tensors or scaling not in ("none", "linear"):
            raise UnsupportedModel(
                f"{self.file.path}: its RoPE scaling is not read from GGUF; use a safetensors folder"
            )
        theta = self.number("rope.freq_base", 10_000.0)
        if scaling == "none":
            return {"rope_type": "default", "rope_theta": theta}
        return {"rope_type": "linear", "rope_theta": theta, "factor": self.number(key)}

    def head_dim(self, hidden: int, heads: int, kv_heads: int) -> int:
        """The width of a head, which Q, K, V and RoPE must agree on."""
        default = self.count("rope.dimension_count", max(1, hidden // heads))
        head_dim = self.count("attention.key_length", default)
        if heads % kv_heads or hidden % heads or head_dim % 2:
            raise MalformedWeights(
                f"{self.file.path}: {heads} heads, {kv_heads} KV heads of width {head_dim}, hidden size {hidden}: "
                "impossible"
            )
        for key in ("rope.dimension_count", "attention.value_length"):
            if self.count(key, head_dim) != head_dim:
                raise UnsupportedModel(
                    f"{self.file.path}: {self.architecture}.{key} differs from the head size {head_dim}: not supported"
                )
        return head_dim

    def common(self) -> dict[str, Any]:
        """What transformers' configurations of all these architectures call the same."""
        hidden, heads = self.count("embedding_length"), self.count("attention.head_count")
        kv_heads = self.count("attention.head_count_kv", heads)
        return {
            "vocab_size": self.vocab_size(),
            "hidden_size": hidden,
            "intermediate_size": self.count("feed_forward_length"),
            "num_hidden_layers": self.count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": self.head_dim(hidden, heads, kv_heads),
            "max_position_embeddings": self.count("context_length"),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self.file.tensors,
            "bos_token_id": self.token_id("bos"),
            "eos_token_id": self.token_id("eos"),
            "pad_token_id": self.token_id("padding"),
            "dtype": "float32",
        }

    def end_token_ids(self) -> list[int]:
        """What ends an answer: the end of a text, of a turn, of a message to a tool. Where the file names no end of a
        turn, a control token may be called like one, beside an eos that is the end of a text."""
        vocab_size = self.vocab_size()
        eot, eom = (self._metadata.get(f"tokenizer.ggml.{which}_token_id") for which in ("eot", "eom"))
        found = [self.token_id("eos"), eot, eom]
        tokens, kinds = (self._metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
        if eot is None and isinstance(tokens, list) and isinstance(kinds, list) and len(tokens) == len(kinds):
            called = [tokens.index(end) for end in _TURN_ENDS if end in tokens]
            found += [token_id for token_id in called if kinds[token_id] == CONTROL]  # any other is text
        # Some files name one that there isn't, for none.
        return [token_id for token_id in found if type(token_id) is int and 0 <= token_id < vocab_size]

    def token_id(self, which: str) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{which}_token_id")
        if value is not None and (type(value) is not int or value >= self.vocab_size()):
            raise MalformedWeights(f"{self.file.path}: tokenizer.ggml.{which}_token_id is {value!r}, no token's id")
        return value
