"""K/V of some tokens where the pool has them: what ships them copies them once, to where they leave from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class KvRows:
    """Rows ``at`` ``[tokens]`` (int64) of each of some ``layers`` ``[slots, bytes of a token]``, in their order.

    They hold while the request that ships them holds the blocks. One that the engine has failed doesn't any more: what
    leaves for it then may be anybody's, and no seal follows, without which decode throws all of it away.
    """

    layers: tuple[Bytes, ...]
    at: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Bytes, as of any other payload, which is one run of them."""
        row_bytes: int = self.layers[0].shape[1]
        return len(self.layers) * len(self.at) * row_bytes

    def part(self, layers: slice, tokens: slice) -> KvRows:
        return KvRows(self.layers[layers], self.at[tokens])
