"""Plain, slow references that Shoal is compared with: transformers' own generation, and the paper's shallow prefill.

Built on the modules of a transformers model (embedding, norms, projections, MLP, rotary tables) of any family that
Shoal runs; nothing of Shoal's own model or engine is used. One prompt at a time, any dtype; every K/V is computed once,
so a 1,500-token prompt of SmolLM2-135M takes seconds.

The paper: POP (arXiv 2602.03295). With K layers kept of L, prompt tokens 0..N-2 run layers 0..K-1; a skipped layer's
K/V come from the state that left layer K-1, by that layer's own input norm, projections and RoPE; the boundary token
N-1 and all that follow run every layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Rope = tuple[Tensor, Tensor]
Cache = dict[int, tuple[Tensor, Tensor]]
"""Of each layer the K (after RoPE) and V so far, ``[1, kv_heads, tokens, head_dim]``; a layer without any is absent."""


@dataclass(frozen=True)
class Generated:
    """Greedy output; ``gaps`` says how far the best logit of each step was above the second."""

    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]


@torch.no_grad()
def full_generate(
    model: Any, ids: Sequence[int], max_new_tokens: int, *, eos_token_ids: Sequence[int] = ()
) -> Generated:
    """transformers' own greedy ``generate``. Nothing ends it early but ``eos_token_ids`` (which it then includes)."""
    prompt = torch.tensor([list(ids)])
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids) or None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return Generated(tuple(output.sequences[0, len(ids) :].tolist()), tuple(_gap(step[0]) for step in output.logits))


@torch.no_grad()
def pop_generate(
    model: Any,
    ids: Sequence[int],
    max_new_tokens: int,
    num_skipped: int,
    *,
    eos_token_ids: Sequence[int] = (),
    num_boundary: int = 1,
) -> Generated:
    """The paper's shallow prefill, then greedy decoding at full depth. ``num_skipped == 0`` is the plain model."""
    cache: Cache = {}
    num_shallow = max(0, len(ids) - num_boundary)
    encode_shallow(model, ids[:num_shallow], num_skipped, cache)
    return _continue(model, ids, num_shallow, max_new_tokens, cache, eos_token_ids)


@torch.no_grad()
def speed_generate(
    model: Any, ids: Sequence[int], max_new_tokens: int, num_skipped: int, *, num_anchors: int, num_last: int = 1
) -> Generated:
    """SPEED (arXiv 2605.06105): what lies between the first ``num_anchors`` tokens and the ``num_last`` last ones runs
    the kept layers alone, and has no K/V in the others."""
    first_full = max(len(ids) - num_last, min(num_anchors, len(ids)))
    num_anchors = min(num_anchors, first_full)
    cache: Cache = {}
    if num_anchors:
        states = run_layers(model, ids[:num_anchors], 0, all_layers(model), cache)
    if num_anchors < first_full:
        num_kept = len(model.model.layers) - num_skipped
        run_layers(model, ids[num_anchors:first_full], num_anchors, range(num_kept), cache)
    if first_full == len(ids):  # the last token is an anchor, and was run: what follows it is read off there
        return _continue(model, ids, first_full, max_new_tokens, cache, (), states)
    return _continue(model, ids, first_full, max_new_tokens, cache, ())


def _continue(
    model: Any,
    ids: Sequence[int],
    start: int,
    max_new_tokens: int,
    cache: Cache,
    eos_token_ids: Sequence[int],
    states: Tensor | None = None,
) -> Generated:
    """Greedy decoding at full depth, from the prompt's tokens ``start..`` on, or from ``states`` if there are none."""
    token_ids: list[int] = []
    gaps: list[float] = []
    newest, position = list(ids[start:]), start
    for _ in range(max_new_tokens):
        if newest:
            states = run_layers(model, newest, position, all_layers(model), cache)
        assert states is not None
        position += len(newest)
        logits = logits_of(model, states[-1:])[0]
        token_id = int(logits.argmax())
        token_ids.append(token_id)
        gaps.append(_gap(logits))
        newest = [token_id]
        if token_id in eos_token_ids:
            break
    return Generated(tuple(token_ids), tuple(gaps))


@torch.no_grad()
def pop_logits(
    model: Any,
    ids: Sequence[int],
    num_prompt_tokens: int,
    num_skipped: int,
    *,
    project: bool = True,
    boundary: bool = True,
    remove_everywhere: bool = False,
) -> Tensor:
    """Logits ``[len(ids) - N + 1, vocab]`` after each of the tokens ``N-1..``, with ``ids`` given, not generated.

    Without ``project`` the skipped layers hold no K/V of the prompt; without ``boundary`` the last prompt token is
    shallow too, and the first row is read from the state that left the last kept layer; with ``remove_everywhere``
    the skipped layers run at no stage. These are the method's negative controls.
    """
    cache: Cache = {}
    if remove_everywhere:
        kept = range(len(model.model.layers) - num_skipped)
        return logits_of(model, run_layers(model, ids, 0, kept, cache)[num_prompt_tokens - 1 :])
    num_shallow = num_prompt_tokens - 1 if boundary else num_prompt_tokens
    shallow = encode_shallow(model, ids[:num_shallow], num_skipped, cache, project=project)
    deep = run_layers(model, ids[num_shallow:], num_shallow, all_layers(model), cache)
    return logits_of(model, deep if boundary else torch.cat([shallow[-1:], deep]))


@torch.no_grad()
def gated_logits(model: Any, ids: Sequence[int], num_prompt_tokens: int, gates: tuple[Tensor, Tensor]) -> Tensor:
    """Logits ``[len(ids) - N + 1, vocab]`` after each of the tokens ``N-1..``, where all that a layer adds to the
    residual is multiplied by its number in the first of ``gates`` (``[layers]``) for the tokens ``0..N-2``, in the
    second for the others.
    """
    prefill, decode = gates
    is_prompt = torch.arange(len(ids)) < num_prompt_tokens - 1
    token_gates = torch.where(is_prompt, prefill[:, None], decode[:, None])
    return logits_of(model, run_layers(model, ids, 0, all_layers(model), {}, token_gates)[num_prompt_tokens - 1 :])


def token_nlls(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Negative log-likelihood (nats) of each of ``ids``, ``[len(ids)]``; ``logits[i]`` predicts ``ids[i]``."""
    return F.cross_entropy(logits[: len(ids)].double(), torch.tensor(list(ids)), reduction="none")


def encode_shallow(
    model: Any, ids: Sequence[int], num_skipped: int, cache: Cache, *, project: bool = True, start: int = 0
) -> Tensor:
    """Shallow prefill of ``ids``, at positions ``start..``, into ``cache``; their states after the last kept layer."""
    num_kept = len(model.model.layers) - num_skipped
    states = run_layers(model, ids, start, range(num_kept), cache)
    if project:
        for index in range(num_kept, len(model.model.layers)):
            layer = model.model.layers[index]
            rope = _rope(model, layer.self_attn, states[None], start)
            _append_kv(layer.self_attn, layer.input_layernorm(states[None]), rope, index, cache)
    return states


def run_layers(
    model: Any, ids: Sequence[int], start: int, layers: Iterable[int], cache: Cache, gates: Tensor | None = None
) -> Tensor:
    """Run ``ids``, at positions ``start..``, through ``layers``; K/V go to ``cache``. States ``[tokens, hidden]``.

    ``gates`` ``[layers, tokens]`` multiply what a layer adds to a token's state.
    """
    states = model.model.embed_tokens(torch.tensor([list(ids)], dtype=torch.long))
    for index in layers:
        layer = model.model.layers[index]
        rope = _rope(model, layer.self_attn, states, start)
        gate = 1 if gates is None else gates[index, :, None]
        mixed = _attend(layer.self_attn, layer.input_layernorm(states), rope, index, cache)
        if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma norms what is added, too
            states = states + gate * layer.post_attention_layernorm(mixed)
            added = layer.mlp(layer.pre_feedforward_layernorm(states))
            states = states + gate * layer.post_feedforward_layernorm(added)
        else:
            states = states + gate * mixed
            states = states + gate * layer.mlp(layer.post_attention_layernorm(states))
    return states[0]


def _attend(attention: Any, normed: Tensor, rope: Rope, index: int, cache: Cache) -> Tensor:
    """Causal attention of the newest tokens over what they may see of the K/V that the layer holds."""
    keys, values = _append_kv(attention, normed, rope, index, cache)
    queries = _rotate(_heads(attention, "q", normed), rope)
    num_queries, num_keys = queries.shape[2], keys.shape[2]
    newest = num_keys - num_queries
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(newest)
    window = _window(attention)
    if window is not None:
        visible = visible.triu(newest - window + 1)
    mixed = _mix(attention, queries, keys, values, visible)
    return attention.o_proj(mixed.transpose(1, 2).flatten(2))


def _mix(attention: Any, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    cap = getattr(attention.config, "attn_logit_softcapping", None)
    if cap is None:
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, enable_gqa=True, scale=attention.scaling
        )
    keys, values = (part.repeat_interleave(queries.shape[1] // part.shape[1], dim=1) for part in (keys, values))
    scores = cap * torch.tanh(queries @ keys.transpose(2, 3) * attention.scaling / cap)
    return scores.masked_fill(~visible, -torch.inf).softmax(dim=-1) @ values


def _window(attention: Any) -> int | None:
    """Mistral has one window for all layers, in its configuration; the others say it layer by layer."""
    everywhere = attention.config.sliding_window if attention.config.model_type == "mistral" else None
    return getattr(attention, "sliding_window", everywhere)


def _append_kv(attention: Any, normed: Tensor, rope: Rope, index: int, cache: Cache) -> tuple[Tensor, Tensor]:
    keys = _rotate(_heads(attention, "k", normed), rope)
    values = _heads(attention, "v", normed)
    if index in cache:
        keys, values = torch.cat([cache[index][0], keys], dim=2), torch.cat([cache[index][1], values], dim=2)
    cache[index] = keys, values
    return keys, values


def _heads(attention: Any, part: str, normed: Tensor) -> Tensor:
    """Queries, keys or values ``[1, heads, tokens, head_dim]``, through the head norm if there is one for them."""
    heads = getattr(attention, f"{part}_proj")(normed).unflatten(2, (-1, attention.head_dim))
    return getattr(attention, f"{part}_norm", lambda same: same)(heads).transpose(1, 2)


def _rope(model: Any, attention: Any, states: Tensor, start: int) -> Rope:
    """Cosines and sines of ``states`` ``[1, tokens, hidden]``, by the table of this layer where there are several."""
    positions = torch.arange(start, start + states.shape[1])[None]
    rotary = model.model.rotary_emb
    of_type = [attention.layer_type] if hasattr(rotary, "layer_types") else []
    cos, sin = rotary(states, positions, *of_type)
    return cos[:, None], sin[:, None]


def _rotate(heads: Tensor, rope: Rope) -> Tensor:
    low, high = heads.chunk(2, dim=-1)
    return heads * rope[0] + torch.cat([-high, low], dim=-1) * rope[1]


def logits_of(model: Any, states: Tensor) -> Tensor:
    logits = model.lm_head(model.model.norm(states))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def all_layers(model: Any) -> range:
    return range(len(model.model.layers))


def _gap(logits: Tensor) -> float:
    best, second = logits.topk(2).values.tolist()
    return best - second
