"""What whole layers are to the kernels: the structures of src/layers.hpp, src/decode.cpp and src/heads.hpp.

All of it is pointers: whoever makes them keeps the tensors, which must be contiguous.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

_Pointer, _Int64, _Float, _Int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32


class Shape(ctypes.Structure):
    """Sizes of a model; ``activation`` is 0 for SiLU, 1 for GELU (tanh)."""

    _fields_ = (
        ("hidden_size", _Int64),
        ("intermediate_size", _Int64),
        ("num_heads", _Int64),
        ("kv_heads", _Int64),
        ("head_dim", _Int64),
        ("eps", _Float),
        ("attention_scale", _Float),
        ("activation", _Int32),
    )


class Matrix(ctypes.Structure):
    """In bfloat16, packed (model/packed.py), or in int8 with float32 ``scales``: packed, too (model/int8.py), or where
    it ``is_by_rows``, as the shortlist has it (model/shortlist.py)."""

    _fields_ = (("weights", _Pointer), ("scales", _Pointer), ("bias", _Pointer), ("is_by_rows", _Int64))


class Layer(ctypes.Structure):
    """One layer; ``rope`` and ``reads`` are indices into the step's."""

    _fields_ = (
        ("input_norm", _Pointer),
        ("qkv", Matrix),
        ("q_norm", _Pointer),
        ("k_norm", _Pointer),
        ("out", Matrix),
        ("attention_post_norm", _Pointer),
        ("mlp_norm", _Pointer),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("mlp_post_norm", _Pointer),
        ("pool", _Pointer),
        ("rope", _Int64),
        ("reads", _Int64),
    )


class Group(ctypes.Structure):
    """Rows whose contexts are of like length; ``slots``, or without them ``first_slot`` and what follows."""

    _fields_ = (
        ("rows", _Pointer),
        ("slots", _Pointer),
        ("first_slot", _Int64),
        ("longest", _Int64),
        ("lengths", _Pointer),
        ("batch", _Int64),
    )


class Prompt(ctypes.Structure):
    """Rows of one sequence, and its context as in ``Group``; ``window`` is 0 where they see all of it."""

    _fields_ = (
        ("first_row", _Int64),
        ("num_rows", _Int64),
        ("slots", _Pointer),
        ("first_slot", _Int64),
        ("num_context", _Int64),
        ("window", _Int64),
    )


class Reads(ctypes.Structure):
    """How layers of one kind read the pool."""

    _fields_ = (
        ("groups", ctypes.POINTER(Group)),
        ("num_groups", _Int64),
        ("prompts", ctypes.POINTER(Prompt)),
        ("num_prompts", _Int64),
    )

    @classmethod
    def of(cls, groups: Sequence[Group], prompts: Sequence[Prompt]) -> Reads:
        return cls((Group * len(groups))(*groups), len(groups), (Prompt * len(prompts))(*prompts), len(prompts))


class Rope(ctypes.Structure):
    """Of one table, ``[rows, head_dim / 2]`` each."""

    _fields_ = (("cos", _Pointer), ("sin", _Pointer))


class Head(ctypes.Structure):
    """What makes ``logits`` ``[num_rows, num_outputs]`` of the states that leave the last layer."""

    _fields_ = (("norm", _Pointer), ("by", Matrix), ("num_outputs", _Int64), ("logits", _Pointer))


class Step(ctypes.Structure):
    """``hidden`` is what goes in and comes out; ``slots`` ``[num_rows]`` are where K/V of the rows go. Without a
    ``head``, as all are that Python makes, there are no logits."""

    _fields_ = (
        ("num_rows", _Int64),
        ("hidden", _Pointer),
        ("slots", _Pointer),
        ("ropes", ctypes.POINTER(Rope)),
        ("reads", ctypes.POINTER(Reads)),
        ("head", ctypes.POINTER(Head)),
    )


class Decoding(ctypes.Structure):
    """A step of sequences that go on by their last token, whose states ``hidden`` ``[num_rows, hidden_size]`` are.

    ``sequences`` int64: of each how many tokens it has, how many blocks, and these. ``ropes`` are of all positions;
    ``windows`` int64 ``[num_kinds]`` what layers see whose ``reads`` is that index, 0 for all.
    """

    _fields_ = (
        ("num_rows", _Int64),
        ("hidden", _Pointer),
        ("sequences", _Pointer),
        ("block_tokens", _Int64),
        ("ropes", ctypes.POINTER(Rope)),
        ("num_ropes", _Int64),
        ("windows", ctypes.POINTER(_Int64)),
        ("num_kinds", _Int64),
        ("head", ctypes.POINTER(Head)),
    )


class Store(ctypes.Structure):
    """Where keys and values go, and by what keys are rotated, ``[rows, head_dim / 2]`` each."""

    _fields_ = (("pool", _Pointer), ("cos", _Pointer), ("sin", _Pointer))


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def slots(context: torch.Tensor | slice) -> tuple[int | None, int]:
    """Where a context's slots are listed, or the first of those that follow one another."""
    return (None, context.start) if isinstance(context, slice) else (context.data_ptr(), 0)
