"""The compiled kernels, called with tensors. All take and give bfloat16 on the CPU, but for weights that may be int8;
nothing is checked twice here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from shoal.backends.cpu.build import SHIPPED, library
from shoal.backends.cpu.layers import Decoding, Layer, Shape, Step, Store, pointer, slots
from shoal.errors import ConfigError, InternalError

HEAD_DIMS = frozenset({64, 128, 256})
# Of a step that may be run whole, without hearing how far it is: with more it takes long.
MAX_FEW_ROWS = 64

_PTR, _INT, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "shoal_attend_prompt": [
        _PTR, _INT64, _PTR, _PTR, _INT64, _INT64, _INT64, _INT, _INT, _INT, _INT64, _FLOAT, _PTR, _INT,
    ],
    "shoal_attend_decode": [
        _PTR, _INT64, _PTR, _PTR, _PTR, _INT64, _INT64, _PTR, _INT64, _INT, _INT, _INT, _FLOAT, _PTR, _INT,
    ],
    "shoal_add_norm": [_PTR, _PTR, _PTR, _INT64, _INT64, _FLOAT, _PTR, _PTR, _INT],
    "shoal_rotate_store": [_PTR, _INT64, _PTR, _PTR, _INT64, _INT, _INT, _INT, _PTR, _PTR, _INT],
    "shoal_linear": [_PTR, _PTR, _PTR, _INT64, _INT64, _INT64, _PTR, _INT],
    "shoal_project": [_PTR, _PTR, _PTR, _INT64, _INT64, _PTR, _INT64, _PTR, _INT, _INT, _INT],
    "shoal_int8_linear": [_PTR, _PTR, _PTR, _PTR, _INT64, _INT64, _INT64, _INT, _PTR, _INT],
    "shoal_whole_linear": [_PTR, _PTR, _PTR, _INT64, _INT64, _INT64, _PTR, _INT],
    "shoal_layers": [_PTR, _PTR, _INT64, _PTR, _INT],
    "shoal_decode": [_PTR, _PTR, _INT64, _PTR, _INT],
    "shoal_tiles": [_INT],
    "shoal_gate": [_PTR, _INT, _INT64, _INT64, _PTR, _INT],
    "shoal_gated_linear": [_PTR, _PTR, _PTR, _INT64, _INT64, _INT64, _INT, _PTR, _INT],
    "shoal_packed_rows": [_PTR, _INT64, _PTR, _INT64, _INT64, _PTR],
    "shoal_argmax": [_PTR, _INT64, _INT64, _PTR, ctypes.POINTER(_INT64), _INT],
    "shoal_settle": [_PTR, _PTR, _PTR, _INT64, _INT64, _INT64, _PTR, ctypes.POINTER(_INT64), _INT],
    "shoal_draw": [_PTR, _INT64, _INT64, _PTR, _PTR, _PTR, _PTR, _PTR, _INT],
    "shoal_copy_rows": [_PTR, _INT64, _INT64, _INT64, _PTR, _PTR, ctypes.POINTER(ctypes.c_uint32)],
    "shoal_gather_rows": [_PTR, _INT64, _PTR, _INT64, _INT64, _PTR, ctypes.POINTER(ctypes.c_uint32)],
}  # fmt: skip


@cache
def load() -> NativeKernels:
    """Once a process. Raises ConfigError that says why there are none."""
    path = library()
    try:
        return NativeKernels(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        advice = "it's a wheel's for another system: install another" if path.parent.name == SHIPPED else "remove it"
        raise ConfigError(f"{path} can't be loaded ({error}): {advice}") from error


class NativeKernels:
    """Each method allocates what it returns, and runs on as many threads as torch does, but of the kernels' own."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._functions = {}
        for name, signature in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = signature, ctypes.c_int
            self._functions[name] = function

    @property
    def has_tiles(self) -> bool:
        """Whether they multiply by the processor's matrix unit."""
        return bool(self._functions["shoal_tiles"](-1))

    def use_tiles(self, allowed: bool = True) -> bool:
        """Whether they multiply by the processor's matrix unit from now on: where it has one, and it is allowed."""
        return bool(self._functions["shoal_tiles"](int(allowed)))

    def attend_prompt(
        self,
        queries: torch.Tensor,
        pool: torch.Tensor,
        context: torch.Tensor | slice,
        num_context: int,
        window: int | None,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """``queries`` ``[rows, heads, head_dim]`` (rows may be apart) are of the last ones of ``num_context`` tokens at
        the slots ``context`` of ``pool`` ``[slots, 2, kv_heads, head_dim]``; each sees the ``window`` up to itself."""
        rows, heads, head_dim = queries.shape
        listed, first = slots(context)
        self._call(
            "shoal_attend_prompt", queries.data_ptr(), queries.stride(0), pool.data_ptr(), listed, first, num_context,
            rows, heads, pool.shape[2], head_dim, window or 0, scale, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def attend_decode(
        self,
        queries: torch.Tensor,
        rows: torch.Tensor,
        pool: torch.Tensor,
        context: torch.Tensor | slice,
        longest: int,
        lengths: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Of ``queries`` ``[all rows, heads, head_dim]`` those at ``rows`` ``[B]``, each over the first of its
        ``lengths`` ``[B]`` slots of ``context`` ``[B * longest]``; ``out`` is as large as ``queries``."""
        listed, first = slots(context)
        self._call(
            "shoal_attend_decode", queries.data_ptr(), queries.stride(0), rows.data_ptr(), pool.data_ptr(), listed,
            first, longest, lengths.data_ptr(), rows.shape[0], queries.shape[1], pool.shape[2], queries.shape[2],
            scale, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def add_norm(
        self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor | None, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(``hidden + added``, its RMS norm times ``weight``, if any); ``hidden`` itself where nothing is added."""
        out = torch.empty_like(hidden)
        total = hidden if added is None else torch.empty_like(hidden)
        rows, size = hidden.shape
        self._call(
            "shoal_add_norm", hidden.data_ptr(), pointer(added), pointer(weight), rows, size, eps, total.data_ptr(),
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return total, out

    def add(self, hidden: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """``hidden + added``."""
        total = torch.empty_like(hidden)
        rows, size = hidden.shape
        self._call(
            "shoal_add_norm", hidden.data_ptr(), added.data_ptr(), None, rows, size, 0.0, total.data_ptr(), None,
            torch.get_num_threads(),
        )  # fmt: skip
        return total

    def rotate_store(
        self,
        heads: torch.Tensor,
        num_heads: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        pool: torch.Tensor,
        at: torch.Tensor | None,
    ) -> None:
        """``heads`` ``[rows, num_heads + 2 kv_heads, head_dim]`` (rows may be apart): queries are rotated in place,
        keys on their way into ``pool`` ``[slots, 2, kv_heads, head_dim]``, to ``at`` or one after the other."""
        rows, _, head_dim = heads.shape
        self._call(
            "shoal_rotate_store", heads.data_ptr(), heads.stride(0), cos.data_ptr(), sin.data_ptr(), rows, num_heads,
            pool.shape[2], head_dim, pool.data_ptr(), pointer(at), torch.get_num_threads(),
        )  # fmt: skip

    def linear(
        self, inputs: torch.Tensor, panels: torch.Tensor, outputs: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """``inputs`` ``[rows, size]`` times a matrix ``[outputs, size]`` transposed, which lies in ``panels``
        (model/packed.py)."""
        rows, size = inputs.shape
        out = inputs.new_empty(rows, outputs)
        self._call(
            "shoal_linear", inputs.data_ptr(), panels.data_ptr(), pointer(bias), rows, outputs, size, out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def project(
        self,
        inputs: torch.Tensor,
        panels: torch.Tensor,
        bias: torch.Tensor | None,
        pools: Sequence[torch.Tensor],
        angles: Sequence[tuple[torch.Tensor, torch.Tensor]],
        at: torch.Tensor | None,
    ) -> None:
        """K/V of several layers by one matrix: ``linear``, whose outputs are ``[rows, layers, 2 kv_heads, head_dim]``,
        and ``rotate_store`` of each layer's into its own of ``pools``, by its own cosines and sines of ``angles``."""
        rows, size = inputs.shape
        _, _, kv_heads, head_dim = pools[0].shape
        each = zip(pools, angles, strict=True)
        stores = (Store * len(pools))(*(Store(*map(pointer, (pool, *turns))) for pool, turns in each))
        self._call(
            "shoal_project", inputs.data_ptr(), panels.data_ptr(), pointer(bias), rows, size,
            ctypes.addressof(stores), len(stores), pointer(at), kv_heads, head_dim,
            torch.get_num_threads(),
        )  # fmt: skip

    def int8_linear(
        self, inputs: torch.Tensor, panels: torch.Tensor, scales: torch.Tensor, outputs: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """``inputs`` ``[rows, size]``, rounded to bytes, times a matrix ``[outputs, size]`` transposed, which lies in
        ``panels``, times ``scales`` float32 (model/int8.py)."""
        return self._by_int8(inputs, panels, scales, outputs, bias, -1)

    def int8_gated_linear(
        self,
        inputs: torch.Tensor,
        panels: torch.Tensor,
        scales: torch.Tensor,
        gated: int,
        bias: torch.Tensor | None,
        *,
        is_gelu: bool,
    ) -> torch.Tensor:
        """What ``gate`` makes of ``int8_linear`` with ``2 * gated`` outputs; ``gated`` is a multiple of 32."""
        return self._by_int8(inputs, panels, scales, 2 * gated, bias, int(is_gelu))

    def _by_int8(
        self,
        inputs: torch.Tensor,
        panels: torch.Tensor,
        scales: torch.Tensor,
        outputs: int,
        bias: torch.Tensor | None,
        activation: int,
    ) -> torch.Tensor:
        rows, size = inputs.shape
        out = inputs.new_empty(rows, outputs if activation < 0 else outputs // 2)
        self._call(
            "shoal_int8_linear", inputs.data_ptr(), panels.data_ptr(), scales.data_ptr(), pointer(bias), rows,
            outputs, size, activation, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def whole_linear(self, inputs: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """``inputs`` ``[rows, size]``, rounded to 16 bits, times ``values`` int8 ``[outputs, size]`` transposed, times
        ``scales`` float32 ``[outputs]``: for up to three rows, of any size."""
        rows, size = inputs.shape
        out = inputs.new_empty(rows, values.shape[0])
        self._call(
            "shoal_whole_linear", inputs.data_ptr(), values.data_ptr(), scales.data_ptr(), rows, values.shape[0], size,
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def settle(self, inputs: torch.Tensor, panels: torch.Tensor, bounds: torch.Tensor, outputs: torch.Tensor) -> int:
        """Of ``outputs`` ``[rows, outputs]``, which are of int8, those that are in a panel with what may be a row's
        largest become what ``linear`` with ``panels`` makes of ``inputs`` ``[rows, size]``. ``bounds``
        (model/shortlist.py) say where it can be. Returns the number of panels that were made anew."""
        (rows, num_outputs), size = outputs.shape, inputs.shape[1]
        num_made = _INT64()
        self._call(
            "shoal_settle", inputs.data_ptr(), panels.data_ptr(), bounds.data_ptr(), rows, num_outputs, size,
            outputs.data_ptr(), num_made, torch.get_num_threads(),
        )  # fmt: skip
        return num_made.value

    def gate(self, both: torch.Tensor, *, is_gelu: bool) -> torch.Tensor:
        """``activation(gate) * up`` of ``gate|up`` ``[rows, 2 * size]``."""
        rows, size = both.shape[0], both.shape[1] // 2
        out = both.new_empty(rows, size)
        self._call("shoal_gate", both.data_ptr(), int(is_gelu), rows, size, out.data_ptr(), torch.get_num_threads())
        return out

    def gated_linear(
        self, inputs: torch.Tensor, panels: torch.Tensor, num_gated: int, bias: torch.Tensor | None, *, is_gelu: bool
    ) -> torch.Tensor:
        """``gate`` of ``linear``, with twice ``num_gated`` outputs, a multiple of 32: the same numbers, in one go."""
        rows, size = inputs.shape
        out = inputs.new_empty(rows, num_gated)
        self._call(
            "shoal_gated_linear", inputs.data_ptr(), panels.data_ptr(), pointer(bias), rows, num_gated, size,
            int(is_gelu), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def packed_rows(self, panels: torch.Tensor, outputs: int, index: torch.Tensor) -> torch.Tensor:
        """``[len(index), inputs]``: rows of a matrix of so many ``outputs`` that lies in ``panels`` (model/packed.py).
        On the calling thread alone."""
        rows, size = index.shape[0], 2 * panels.shape[1]
        out = panels.new_empty(rows, size)
        self._call("shoal_packed_rows", panels.data_ptr(), outputs, index.data_ptr(), rows, size, out.data_ptr())
        return out

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """``[rows]`` int64, of each row of ``logits`` ``[rows, size]`` the first of the largest, or of the NaNs; and
        whether all of these are finite."""
        rows, size = logits.shape
        out, num_finite = logits.new_empty(rows, dtype=torch.int64), _INT64()
        self._call("shoal_argmax", logits.data_ptr(), rows, size, out.data_ptr(), num_finite, torch.get_num_threads())
        return out, num_finite.value == rows

    def draw(
        self,
        logits: torch.Tensor,
        temperatures: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        uniforms: Sequence[float],
    ) -> torch.Tensor:
        """``[rows]`` int64: a token of each row of ``logits`` ``[rows, size]``, none of them NaN, by its options (a top
        k of 0: none), as engine/sampler.py has them."""
        rows, size = logits.shape
        out = logits.new_empty(rows, dtype=torch.int64)
        floats = np.array([temperatures, top_p, uniforms], np.float64)
        limits = np.array(top_k, np.int64)
        of_temperature, of_top_p, of_uniform = (each.ctypes.data for each in floats)
        self._call(
            "shoal_draw", logits.data_ptr(), rows, size, of_temperature, limits.ctypes.data, of_top_p, of_uniform,
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def run_layers(self, shape: Shape, first: Layer, num_layers: int, step: Step) -> None:
        """``num_layers`` of an array of layers from ``first`` on."""
        self._call(
            "shoal_layers", ctypes.addressof(shape), ctypes.addressof(first), num_layers, ctypes.addressof(step),
            torch.get_num_threads(),
        )  # fmt: skip

    def decode(self, shape: Shape, first: Layer, num_layers: int, decoding: Decoding) -> None:
        """All layers, and the head, of sequences that go on: planned and run in one call."""
        self._call(
            "shoal_decode", ctypes.addressof(shape), ctypes.addressof(first), num_layers, ctypes.addressof(decoding),
            torch.get_num_threads(),
        )  # fmt: skip

    def copy_rows(
        self,
        source: npt.NDArray[np.uint8],
        num_rows: int,
        row_bytes: int,
        targets: Sequence[npt.NDArray[np.uint8]],
        at: npt.NDArray[np.int64] | None = None,
    ) -> int:
        """``source`` ``[targets, rows, row_bytes]``, rows of a multiple of 64, to the rows ``at`` ``[rows]`` of each
        target, or to its first ones. Returns the CRC32C of what was copied. On the calling thread alone."""
        addresses = np.array([target.ctypes.data for target in targets], np.uintp)
        crc = ctypes.c_uint32()
        self._call(
            "shoal_copy_rows", source.ctypes.data, len(targets), num_rows, row_bytes, addresses.ctypes.data,
            None if at is None else at.ctypes.data, crc,
        )  # fmt: skip
        return crc.value

    def gather_rows(
        self, sources: Sequence[npt.NDArray[np.uint8]], at: npt.NDArray[np.int64], target: npt.NDArray[np.uint8]
    ) -> int:
        """The rows ``at`` ``[rows]`` of each source ``[any, row_bytes]``, of a multiple of 64 bytes, to ``target``
        ``[sources, rows, row_bytes]``. Returns the CRC32C of what was copied. On the calling thread alone."""
        addresses = np.array([source.ctypes.data for source in sources], np.uintp)
        crc = ctypes.c_uint32()
        self._call(
            "shoal_gather_rows", addresses.ctypes.data, len(sources), at.ctypes.data, len(at), sources[0].shape[1],
            target.ctypes.data, crc,
        )  # fmt: skip
        return crc.value

    def _call(self, name: str, *arguments: float | ctypes.c_uint32 | ctypes.c_int64 | None) -> None:
        if self._functions[name](*arguments):
            raise InternalError(f"{name} can't run on these shapes")
