"""What stands in for CUDA's graphs where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shoal.model import kv_pool as pool
from shoal.model import rope

# What asks the device for a value or makes a shape of one, and what comes from the host: no graph can hold it.
_FORBIDDEN = {
    "_local_scalar_dense", "_unique", "_unique2", "equal", "is_nonzero", "lift_fresh", "lift_fresh_copy",
    "masked_select", "nonzero", "unique_dim",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_"}


class RecordedGraph:
    """Records operations as CUDA would: a replay knows nothing but those, and the tensors that they were given then.

    What a later step changed anywhere else, Python's values included, it doesn't see.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.num_replays = 0

    def capture(self, run: Callable[[], None]) -> None:
        run()  # as CUDA's: what is made when first called is there then
        with _no_values(), _Recorder(self._calls):
            run()

    @torch.inference_mode()
    def replay(self) -> None:
        self.num_replays += 1
        for call, arguments, options, results in self._calls:
            again = call(*arguments, **options)
            for held, new in zip(_tensors(results), _tensors(again), strict=True):
                is_view = held.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
                if not is_view:
                    held.copy_(new)

    @property
    def num_calls(self) -> int:
        return len(self._calls)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = func.overloadpacket.__name__, kwargs or {}
        # Indexing by a mask makes a shape of data, too.
        by_mask = name in _INDEXING and any(index.dtype == torch.bool for index in _tensors(args[1]))
        if name in _FORBIDDEN or by_mask:
            raise RuntimeError(f"{name} in a graph")
        results = func(*args, **options)
        self._calls.append((func, args, options, results))
        return results


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@contextmanager
def _no_values() -> Iterator[None]:
    """Where torch doesn't tell a recorder, as in inference mode: what makes Python's values of a tensor's."""

    def refuse(name: str) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError(f"{name} in a graph")

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "numpy", "__int__", "__float__", "__index__", "__bool__"):
            patch.setattr(torch.Tensor, name, refuse(name))
        yield


class BrokenGraph:
    """Can't be captured."""

    def capture(self, run: Callable[[], None]) -> None:
        raise RuntimeError("no memory for this")

    def replay(self) -> None:
        raise AssertionError("never captured")


def compute_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch, and whatever the values: numpy, which copies K/V on a CPU, and looking up can't be recorded."""
    monkeypatch.setattr(pool, "_is_plain", lambda rows: False)
    monkeypatch.setattr(rope, "_remembered", rope._computed)
