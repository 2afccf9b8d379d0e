"""A GPU that isn't there. Its tensors say that they are on one, their numbers are the CPU's.

What a GPU refuses is an error here, too: an operation of its tensors with the host's, numpy's view of them. A copy from
or to the host that needn't be waited for isn't made before somebody waits for its stream. And what was made on another
stream isn't used before its memory is kept for the current one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from shoal.backends import attention
from shoal.model import kv_pool as pool
from shoal.model import rope

GPU = torch.device("cuda:0")
_MOVING = {"_to_copy", "copy_"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_CPU, _CUDA = 0, 1


class OnGpu(torch.Tensor):
    """``held`` has its numbers, ``streams`` may use it."""

    held: torch.Tensor
    streams: set[Stream]

    @staticmethod
    def __new__(cls, held: torch.Tensor, stream: Stream) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU
        )
        made.held, made.streams = held, {stream}
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a GPU's tensor that is none any more")

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a GPU's tensor for numpy: copy it to the host before")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: Any) -> None:
        self.streams.add(stream)


class Stream:
    def __init__(self, _device: torch.device | None = None) -> None:
        self._late: list[Callable[[], object]] = []

    def copy_later(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.zero_()
        self._late.append(lambda: target.copy_(source))

    def synchronize(self) -> None:
        while self._late:
            self._late.pop(0)()


class Event:
    """``waited`` for in their order, as many as there were."""

    waited: ClassVar[list[Event]] = []

    def record(self, stream: Stream) -> None:
        self._stream = stream

    def synchronize(self) -> None:
        self.waited.append(self)
        self._stream.synchronize()


_DEFAULT = Stream()


class _Operations(TorchDispatchMode):
    """Carries out each operation on the CPU, and says where its results are."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = _DEFAULT

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = func.overloadpacket.__name__, dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, torch.Tensor)]
        _check(name, args, tensors)
        for tensor in filter(_is_there, tensors):
            if self.stream not in tensor.streams:
                raise RuntimeError(f"{name} of another stream's tensor")
        device = options.get("device")
        if device is not None:
            options["device"] = torch.device("cpu")
            lands = torch.device(device).type == "cuda"
        else:
            lands = isinstance(args[0] if name == "copy_" else next(filter(_is_there, tensors), None), OnGpu)
        options.pop("pin_memory", None)
        is_late = bool(options.get("non_blocking") if name == "_to_copy" else name == "copy_" and args[2:] and args[2])
        if not lands and any(map(_is_there, tensors)):
            if name == "copy_" and is_late:
                self.stream.copy_later(args[0], args[1].held.clone())
                return args[0]
            self.stream.synchronize()
        found = func(*tree_map(_held, args), **tree_map(_held, options))
        if func._schema.is_mutable:  # the very tensors come back that it was given
            given = {id(_held(tensor)): tensor for tensor in tensors}
            return tree_map(lambda one: given.get(id(one), one), found)
        if name == "_to_copy" and is_late and lands:
            self.stream.copy_later(found, found.clone())
        return tree_map(lambda one: OnGpu(one, self.stream) if lands and isinstance(one, torch.Tensor) else one, found)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before


class _Functions(TorchFunctionMode):
    """What torch would ask a GPU for before it came to an operation."""

    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self._operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, options = tree_map(_with_index, (args, kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and options.get("device") == GPU and not _is_there(args[0]):
            return OnGpu(func(*args, **{**options, "device": "cpu"}).clone(), self._operations.stream)
        return func(*args, **options)


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Within it, in this thread, there is one. Skips the test with a torch that is built otherwise."""
    operations = _Operations()
    _forget()
    with pytest.MonkeyPatch.context() as patch, _guarded():
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
        patch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 26, 1 << 26))
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda _=None: operations.stream)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", operations.on)
        # A tensor that was made outside of it has no views within it that are a subclass's.
        patch.setattr(torch._C, "_InferenceMode", lambda mode: torch.no_grad() if mode else nullcontext())
        patch.setattr(attention, "_last_rows", partial(_last_rows, operations))
        before = torch._C._only_lift_cpu_tensors()  # a list that indexes becomes the host's tensor
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with _Functions(operations), operations:
                yield torch.device("cuda")
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
            _forget()


def _forget() -> None:
    """What is kept for a device, which is another one outside."""
    rope._inv_freq.cache_clear()
    pool._copy_stream.cache_clear()


@contextmanager
def _guarded() -> Iterator[None]:
    """torch makes a device the current one before it computes; the CPU's way to do so does nothing."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        registry = (ctypes.c_void_p * (_CUDA + 1)).in_dll(library, _REGISTRY)
    except (OSError, ValueError) as error:
        pytest.skip(f"this torch is built otherwise: {error}")
    before, registry[_CUDA] = registry[_CUDA], registry[_CPU]
    try:
        yield
    finally:
        registry[_CUDA] = before


def _check(name: str, args: Any, tensors: list[torch.Tensor]) -> None:
    """Raises RuntimeError where a GPU would. A single number may be the host's, and so may indices."""
    ours = [tensor for tensor in tensors if _is_there(tensor)]
    others = [tensor for tensor in tensors if not _is_there(tensor) and tensor.dim()]
    if name in _INDEXING and ours:
        named = [args[0], *([args[2]] if len(args) > 2 and isinstance(args[2], torch.Tensor) else [])]
        others = [tensor for tensor in named if not _is_there(tensor) and (tensor.dim() or tensor is args[0])]
    if ours and others and name not in _MOVING:
        shapes = [[tuple(tensor.shape) for tensor in each] for each in (ours, others)]
        raise RuntimeError(f"{name} of {shapes[0]} on a GPU with the host's {shapes[1]}")


def _last_rows(operations: _Operations, num_rows: int, num_context: int) -> torch.Tensor:
    """torch's is a tensor of a kind of its own, which can't be both."""
    mask = torch.ones(num_rows, num_context, dtype=torch.bool, device="cpu").tril(num_context - num_rows)
    return OnGpu(mask, operations.stream)


def _is_there(value: Any) -> bool:
    return isinstance(value, OnGpu)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


def _with_index(value: Any) -> Any:
    return GPU if isinstance(value, torch.device) and value.type == "cuda" else value
