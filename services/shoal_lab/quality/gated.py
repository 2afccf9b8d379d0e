"""A model with two virtual gates a layer: what each layer adds to the residual can be turned down, and asked about.

A layer computes ``y = x + attn(x) * g`` and ``y + ffn(y) * g``, where ``g`` is ``prefill[l]`` for the prompt tokens
``0..N-2`` and ``decode[l]`` from the boundary token ``N-1`` on (POP, arXiv 2602.03295, section 3). With all gates at
1 it's the plain model. With ``prefill`` at 0 from layer K on it's the shallow plan, exactly: no prompt token changes
any more, so each skipped layer's K/V come from the state that left layer K-1, which is the paper's projection.

The gates need gradients and Shoal's decoder makes none, so this is transformers' own model, with hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shoal.errors import MalformedWeights, ModelError, UnsupportedModel
from shoal.model.families import describe
from shoal.model.files import ModelFiles
from shoal.model.weights import WeightReader, open_weights

# Of each family, the modules of a layer whose outputs are added to the residual: for Gemma these are norms, which
# would undo a gate in front of them.
_BRANCHES = {
    "llama": ("self_attn", "mlp"),
    "qwen2": ("self_attn", "mlp"),
    "qwen3": ("self_attn", "mlp"),
    "mistral": ("self_attn", "mlp"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


@dataclass(frozen=True, slots=True)
class Gates:
    """A number for each layer, ``[num_layers]`` each: ``prefill`` for tokens 0..N-2, ``decode`` for N-1 and later."""

    prefill: Tensor
    decode: Tensor


class GatedModel:
    """transformers' model behind gates, its parameters without gradients.

    Memory of a backward pass over T tokens, R of them a response, in numbers of the model's dtype: ``P`` parameters,
    ``L·T·d`` checkpoints (the input of each layer; what happens within is computed again, a layer at a time), one
    layer's activations, about ``T·(8d + 4i)`` (plus ``h·T²`` where attention has no fused kernel), and ``3·R·V`` for
    the response's logits. d, i, h, V: hidden size, MLP width, heads, vocabulary.
    """

    def __init__(self, model: Any, *, checkpoints: bool = True) -> None:
        branches = _BRANCHES.get(model.config.model_type)
        if branches is None:
            known = ", ".join(sorted(_BRANCHES))
            raise UnsupportedModel(f"model type {model.config.model_type!r} has no gates; those that have: {known}")
        self.model = model.eval().requires_grad_(False)
        self.num_layers: int = model.config.num_hidden_layers
        # [num_layers, tokens]: the gate of each token, while a gated pass runs.
        self._token_gates: Tensor | None = None
        for index, layer in enumerate(model.model.layers):
            for name in branches:
                getattr(layer, name).register_forward_hook(self._gate_of(index))
            if checkpoints:  # not transformers' own switch, which would want the model in training mode
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        *,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> GatedModel:
        """All weights, one tensor at a time. ``on_progress`` is called with (tensors done, tensors in all).

        Raises UnsupportedModel, or MalformedWeights if a tensor is missing, misshapen, or not finite.
        """
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        config: Any = files.config()
        describe(config)
        with no_init_weights(), torch.device(device):
            make: Any = AutoModelForCausalLM.from_config
            # transformers has Gemma 2, for its softcaps, with eager attention alone.
            attention = "eager" if config.model_type == "gemma2" else "sdpa"
            model = make(config, dtype=dtype, attn_implementation=attention)
        model.tie_weights()
        with open_weights(files) as reader:
            _fill(model, reader, on_progress or (lambda done, total: None))
        return cls(model)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def open_gates(self) -> Gates:
        """Gates that are all 1, of at least single precision, and want gradients."""
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        prefill, decode = torch.ones(2, self.num_layers, dtype=dtype, device=self.device).unbind()
        return Gates(prefill.clone().requires_grad_(), decode.clone().requires_grad_())

    def gradients(self, prompt: Sequence[int], response: Sequence[int]) -> Gates:
        """What the response's summed negative log-likelihood (nats) says to each gate at 1: its first derivatives.

        Both vectors, on the CPU in float64, from one forward-backward. Raises ModelError if one isn't finite.
        """
        gates = self.open_gates()
        ids = [*prompt, *response[:-1]]
        # The backward pass runs each layer again from its checkpoint, so the gates stand until it is over.
        with torch.enable_grad(), self._gated(gates, len(prompt), len(ids)):
            logits = self._run(ids, None, len(response))
            wide = logits.to(gates.prefill.dtype)
            loss = F.cross_entropy(wide, torch.tensor(response, device=self.device), reduction="sum")
            prefill, decode = torch.autograd.grad(loss, [gates.prefill, gates.decode])
        if not bool((prefill + decode).isfinite().all()):
            raise ModelError("a gradient is NaN or infinite: try --dtype float32, and check the weights")
        return Gates(prefill.double().cpu(), decode.double().cpu())

    @torch.no_grad()
    def next_logits(self, ids: Sequence[int], cache: Any) -> Tensor:
        """Logits ``[1, vocab]`` after ``ids``, which follow what ``cache`` (from ``new_cache``) holds, ungated."""
        return self._run(ids, cache, 1)

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def _run(self, ids: Sequence[int], cache: Any, num_logits: int) -> Tensor:
        tokens = torch.tensor([list(ids)], device=self.device)
        # The cache goes by position: transformers 5 has renamed that argument.
        output = self.model(tokens, None, None, cache, use_cache=cache is not None, logits_to_keep=num_logits)
        logits: Tensor = output.logits[0]
        return logits

    @contextmanager
    def _gated(self, gates: Gates, num_prompt_tokens: int, num_tokens: int) -> Iterator[None]:
        is_prompt = torch.arange(num_tokens, device=self.device) < num_prompt_tokens - 1
        token_gates = torch.where(is_prompt, gates.prefill[:, None], gates.decode[:, None])
        self._token_gates = token_gates.to(self.model.dtype)
        try:
            yield
        finally:
            self._token_gates = None

    def _gate_of(self, index: int) -> Callable[..., Any]:
        def hook(_module: Any, _arguments: Any, output: Any) -> Any:
            if self._token_gates is None:
                return None
            gate = self._token_gates[index, :, None]
            return (output[0] * gate, *output[1:]) if isinstance(output, tuple) else output * gate

        return hook


def _fill(model: Any, reader: WeightReader, on_progress: Callable[[int, int], None]) -> None:
    """Copy each tensor to its parameter. A tied lm_head comes once, as the embedding."""
    parameters = list(model.named_parameters())
    for index, (name, parameter) in enumerate(parameters):
        tensor = reader.read(name)
        if tensor.shape != parameter.shape:
            raise MalformedWeights(
                f"tensor {name} has shape {tuple(tensor.shape)}, the configuration says {tuple(parameter.shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise MalformedWeights(f"tensor {name} holds NaN or infinity: the file is damaged, copy it again")
        with torch.no_grad():
            parameter.copy_(tensor)
        on_progress(index + 1, len(parameters))
