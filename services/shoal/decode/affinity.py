"""Which replica has probably computed a prompt's beginning: the one that the like went to before.

A guess on purpose: a replica may have forgotten by now, and then it computes; nothing depends on it but time. Plain
Python, bounded, and of one process: keys are salted at its start, so that outside of it they tell nothing.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np

KEY_TOKENS = 64
"""A key stands for so many tokens and all before them. Shorter beginnings are not worth a detour."""
MAX_KEYS = 256
"""Of one prompt: what follows after 16,384 tokens decides nothing any more."""
_KEY_BYTES = 8
_SALT = secrets.token_bytes(16)


def prefix_keys(tenant: str, token_ids: Sequence[int]) -> tuple[bytes, ...]:
    """Keys of a prompt's beginnings, the shortest first; none of a prompt that is shorter than ``KEY_TOKENS``."""
    num_keys = min(len(token_ids) // KEY_TOKENS, MAX_KEYS)
    blocks = np.asarray(token_ids[: num_keys * KEY_TOKENS], dtype="<i8").reshape(num_keys, KEY_TOKENS)
    keys, key = [], tenant.encode()
    for block in blocks:
        key = hashlib.blake2b(key + block.tobytes(), digest_size=_KEY_BYTES, key=_SALT).digest()
        keys.append(key)
    return tuple(keys)


class Affinity:
    """Remembers where the last prompts with each beginning went; of ``max_remembered``, the oldest are forgotten."""

    def __init__(self, max_remembered: int = 1 << 16) -> None:
        self._max_remembered = max_remembered
        self._replica_ids: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replica_ids)

    def note(self, keys: Sequence[bytes], replica_id: str) -> None:
        """A prompt with these beginnings goes to this replica."""
        for key in keys:
            self._replica_ids[key] = replica_id
            self._replica_ids.move_to_end(key)
        while len(self._replica_ids) > self._max_remembered:
            self._replica_ids.popitem(last=False)

    def best(self, keys: Sequence[bytes], replica_ids: AbstractSet[str]) -> str | None:
        """Of these replicas the one that got the longest of these beginnings; ``None`` if none got any."""
        for key in reversed(keys):
            replica_id = self._replica_ids.get(key)
            if replica_id in replica_ids:
                return replica_id
        return None
