"""The device memory behind the blocks.

One tensor per layer, ``[num_slots, 2, num_kv_heads, head_dim]``, and where the layout has states one more,
``[num_slots, state_dim]``; slot ``block * block_tokens + offset`` holds one token. The engine thread reads and writes
blocks of running sequences; decode's sink writes reserved blocks, which no running sequence can see: the rows never
overlap, so there is no lock. What ships a prompt reads rows that were computed (kv_rows.py), which nobody writes to
again before the prompt has given its blocks back, or has failed and isn't sealed.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from shoal.model.kv_layout import KvLayout
from shoal.model.kv_rows import KvRows

_HUGE_PAGE_BYTES = 2 << 20


class KvPool:
    """``num_blocks`` blocks in every layer of ``layout``; ``num_deep_blocks`` in those of a group that is apart.

    ``has_spare_slot``: in each layer there is one slot more, the first of the block after the last. No sequence can own
    it: rows that only fill a step up write there.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_deep_blocks: int = 0,
        has_spare_slot: bool = False,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.num_deep_blocks = num_deep_blocks
        self.has_spare_slot = has_spare_slot
        self.dtype = dtype
        apart = layout.apart
        self._apart = range(0) if apart is None else range(apart.first, apart.last)
        self.layers = [
            _zeros(
                ((num_deep_blocks if layer in self._apart else num_blocks) * layout.block_tokens + has_spare_slot, 2,
                 layout.num_kv_heads, layout.head_dim), dtype, device,
            )
            for layer in range(layout.num_layers)
        ]  # fmt: skip
        self.states = _zeros((num_blocks * layout.block_tokens, layout.state_dim), dtype, device)

    def write(self, layer: int, slots: torch.Tensor, kv: torch.Tensor) -> None:
        """Put ``kv`` ``[tokens, 2, kv_heads, head_dim]`` at ``slots`` ``[tokens]`` (int64)."""
        _put(self.layers[layer], slots, kv.to(self.dtype))

    def read(self, layer: int, slots: torch.Tensor | slice) -> torch.Tensor:
        """K/V at ``slots``, ``[tokens, 2, kv_heads, head_dim]``: a view for a slice, else a copy."""
        held = self.layers[layer]
        return held[slots] if isinstance(slots, slice) else held.index_select(0, slots)

    def read_layers(self, layer_start: int, layer_end: int, slots: torch.Tensor) -> torch.Tensor:
        """A contiguous copy ``[layers, tokens, 2, kv_heads, head_dim]``, as the wire wants it."""
        held = self.layers[layer_start:layer_end]
        copy = held[0].new_empty((len(held), len(slots), *held[0].shape[1:]))
        for layer, target in zip(held, copy, strict=True):
            _take(layer, slots, target)
        return copy

    def rows(self, layer_start: int, layer_end: int, slots: torch.Tensor) -> KvRows | None:
        """The same without a copy; ``None`` where it isn't the host's memory. Raises IndexError as ``read_layers``."""
        held = self.layers[layer_start:layer_end]
        return KvRows(tuple(map(_bytes, held)), _index(slots, held[0])) if all(map(_is_plain, held)) else None

    def write_layers(self, layer_start: int, slots: torch.Tensor, kv: torch.Tensor) -> None:
        """Put ``kv`` ``[layers, tokens, 2, kv_heads, head_dim]`` into the layers from ``layer_start`` on."""
        for offset, arrived in enumerate(kv):
            self.write(layer_start + offset, slots, arrived)

    def host_rows(self) -> list[npt.NDArray[np.uint8]] | None:
        """All layers' memory, ``[slots, bytes of a token]`` each, as views; ``None`` where it isn't the host's."""
        return [_bytes(layer) for layer in self.layers] if all(_is_plain(layer) for layer in self.layers) else None

    def write_states(self, slots: torch.Tensor, states: torch.Tensor) -> None:
        """Put ``states`` ``[tokens, state_dim]`` at ``slots``."""
        _put(self.states, slots, states.to(self.dtype))

    def read_states(self, slots: torch.Tensor) -> torch.Tensor:
        """A contiguous copy ``[tokens, state_dim]``."""
        copy = self.states.new_empty((len(slots), *self.states.shape[1:]))
        _take(self.states, slots, copy)
        return copy

    def copy_blocks(self, pairs: Sequence[tuple[int, int]], *, deep: bool = False) -> None:
        """Copy whole blocks ``(source, target)``: a choice gets its own copy of a block that it must write to.

        ``deep`` copies those of the group that is apart, else those of all other layers.
        """
        size = self.layout.block_tokens
        layers = [held for layer, held in enumerate(self.layers) if (layer in self._apart) == deep] if pairs else []
        if not deep:
            layers.append(self.states)
        for source, target in pairs:
            for held in layers:
                held[target * size : (target + 1) * size] = held[source * size : (source + 1) * size]


def on_host(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` themselves, or of a GPU's a copy, in pinned memory: the driver would copy to other memory piece by piece
    through some of its own. torch keeps what it pinned for the next copy."""
    if not rows.is_cuda:
        return rows.cpu()
    copy = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    copy.copy_(rows, non_blocking=True)
    torch.cuda.current_stream(rows.device).synchronize()
    return copy


def on_device(device: torch.device, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the host's ``rows`` copies on a GPU, complete, so that ``rows`` may be overwritten: made beside what that
    computes, behind which they would wait otherwise. On the host, ``rows`` themselves."""
    if device.type != "cuda":
        return rows
    own = _copy_stream(device)
    with torch.cuda.stream(own):
        copies = tuple(one.to(device, non_blocking=True) for one in rows)
    own.synchronize()
    for copy in copies:  # their memory is the other stream's: not before this one is done with it
        copy.record_stream(torch.cuda.current_stream(device))
    return copies


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for good: torch has some dozens, and gives them again, also that on which a graph is captured just now."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own


# A token is one piece of memory. torch goes element by element in bfloat16, and with threads of its own, which a copy
# doesn't need: at best three times as long, at worst thirty.


def _put(held: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    if rows.shape != (len(slots), *held.shape[1:]):  # numpy would repeat, cut or fill up
        raise ValueError(f"{tuple(rows.shape)} doesn't fit into {len(slots)} slots of {tuple(held.shape[1:])}")
    if _is_plain(held) and _is_plain(rows):
        _tokens(held)[_index(slots, held)] = _tokens(rows)
    else:
        held.index_copy_(0, slots, rows)


def _take(held: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    if not _is_plain(held):
        torch.index_select(held, 0, slots, out=out)
        return
    index = _index(slots, held)
    if index.size and (index == np.arange(index[0], index[0] + index.size)).all():  # in a third of the time
        out.copy_(held[index[0] : index[0] + index.size])
    else:  # its bounds are checked: ``clip`` spares numpy a copy, without which it couldn't raise
        np.take(_bytes(held), index, axis=0, out=_bytes(out), mode="clip")


def _is_plain(rows: torch.Tensor) -> bool:
    return rows.device.type == "cpu" and rows.is_contiguous() and not rows.requires_grad


def _index(slots: torch.Tensor, held: torch.Tensor) -> npt.NDArray[np.int64]:
    """``slots`` for numpy, to which -1 would be the last one. Raises IndexError, as torch does, where one isn't there:
    another's K/V would be a wrong token."""
    index: npt.NDArray[np.int64] = slots.numpy()
    if index.size and not (index.min() >= 0 and index.max() < len(held)):
        raise IndexError(f"slots {index.min()} to {index.max()} of {len(held)}")
    return index


def _bytes(held: torch.Tensor) -> npt.NDArray[np.uint8]:
    """``[tokens, bytes]`` of a contiguous tensor ``[tokens, …]`` on the host: a view."""
    row_bytes = held.shape[1:].numel() * held.element_size()
    rows: npt.NDArray[np.uint8] = held.view(torch.uint8).view(held.shape[0], row_bytes).numpy()
    return rows


def _tokens(held: torch.Tensor) -> npt.NDArray[np.void]:
    """``[tokens]``: a view, too, each token's bytes as one value."""
    rows = _bytes(held)
    return rows.view(np.dtype((np.void, rows.shape[1]))).reshape(-1)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, not garbage: a padded read may touch a slot that nobody wrote, and 0 * NaN would spread.

    On the CPU they come from the operating system page by page as they are first used: torch would write them all
    now, many seconds for a pool of gigabytes. They begin at a page, and a line of K/V is one of the caches (numpy's own
    memory begins 16 bytes later); large layers begin where a huge page may, for systems that give those to who asks.
    """
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(_pages(num_bytes)).view(dtype).view(shape)


def _pages(num_bytes: int) -> npt.NDArray[np.uint8]:
    is_large = num_bytes >= 2 * _HUGE_PAGE_BYTES
    try:
        memory = mmap.mmap(-1, num_bytes + is_large * _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no memory for {num_bytes:,} bytes, which is one layer of the KV pool") from error
    held = np.frombuffer(memory, np.uint8)
    if not is_large:
        return held
    with suppress(OSError, AttributeError):  # another system, or one that has none
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -held.ctypes.data % _HUGE_PAGE_BYTES
    return held[start : start + num_bytes]
