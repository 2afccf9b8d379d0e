"""Single values of messages that come in: each is set and in bounds, or ProtocolViolation says which isn't."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from google.protobuf.message import Message

from shoal.errors import ProtocolViolation

MAX_ID = (1 << 31) - 1
"""Largest token id, position, layer and sequence number: any signed 32-bit index can hold it."""
MAX_TEXT_CHARS = 1024


def value_of(message: Message, name: str) -> Any:
    """A field that must be set."""
    if not message.HasField(name):
        raise ProtocolViolation(f"{message.DESCRIPTOR.name}.{name} is not set")
    return getattr(message, name)


def checked_id(value: int, name: str) -> int:
    if value > MAX_ID:
        raise ProtocolViolation(f"{name} is {value}, above {MAX_ID}")
    return value


def checked_ids(values: Iterable[int], name: str) -> tuple[int, ...]:
    ids = tuple(values)
    checked_id(max(ids, default=0), name)
    return ids


def checked_range(start: int, end: int, name: str) -> tuple[int, int]:
    if not start < end <= MAX_ID:
        raise ProtocolViolation(f"{name} range [{start}, {end}) is empty or out of bounds")
    return start, end


def checked_duration(value: float, name: str) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ProtocolViolation(f"{name} is {value}: not a duration")
    return value


def checked_text(value: str, name: str) -> str:
    if len(value) > MAX_TEXT_CHARS:
        raise ProtocolViolation(f"{name} has {len(value)} characters, above {MAX_TEXT_CHARS}")
    return value
