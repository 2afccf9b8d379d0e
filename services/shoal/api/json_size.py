"""How much JSON a body holds, counted while it comes: what would take the event loop for long isn't parsed at all."""

from __future__ import annotations

from shoal.config import GatewayConfig
from shoal.errors import RequestTooLarge

ITEMS_A_MESSAGE = 10
"""Lists, objects and strings of one message with a part: two objects, a list, and seven names and values."""

_BYTES_A_VALUE = 8
"""Outside strings: a long number takes as long as several short ones."""
_STEP_BYTES = 64 << 10


class JsonSize:
    """Of one body, under the limits of ``config``. What isn't JSON may be counted wrong after its first fault."""

    def __init__(self, config: GatewayConfig) -> None:
        self._max_items = ITEMS_A_MESSAGE * config.max_messages
        self._max_values = config.max_values
        self._num_items = 0  # all but strings
        self._num_quotes = 0
        self._num_values = 0
        self._is_in_string = False
        self._is_escaped = False

    @property
    def refusal(self) -> RequestTooLarge | None:
        """Why this body isn't parsed, once there is too much in it."""
        if self._num_items + self._num_quotes // 2 > self._max_items:
            return RequestTooLarge(
                f"the body has more than {self._max_items} lists, objects and strings: send fewer messages"
            )
        if self._num_values > self._max_values:
            return RequestTooLarge(f"the body has more than {self._max_values} values: send fewer token ids")
        return None

    def add(self, piece: bytes) -> None:
        """Count the body's next bytes, no further than to the limits."""
        for start in range(0, len(piece), _STEP_BYTES):
            if self.refusal is not None:
                return
            self._count(piece[start : start + _STEP_BYTES])

    def _count(self, piece: bytes) -> None:
        bare = piece[self._is_escaped :].replace(rb"\\", b"").replace(rb"\"", b"")
        self._is_escaped = bare.endswith(b"\\")
        parts = bare.split(b'"')
        outside = b"".join(parts[self._is_in_string :: 2])
        self._is_in_string ^= len(parts) % 2 == 0
        self._num_quotes += len(parts) - 1
        self._num_items += outside.count(b"[") + outside.count(b"{")
        num_bytes = len(outside.translate(None, b" \t\r\n"))
        self._num_values += max(outside.count(b","), num_bytes // _BYTES_A_VALUE)
