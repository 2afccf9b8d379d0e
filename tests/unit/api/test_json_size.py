"""How much JSON a body holds, by however many pieces it comes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal.api.json_size import ITEMS_A_MESSAGE, JsonSize
from shoal.config import GatewayConfig

TRICKY = ['"', "\\", '\\"', "\\\\", '[{,"', 'a\\"]', "\n", "ä"]
BODY = {"a": TRICKY, "b": [[1, 2], {"c": None}], '"': "\\", "d": {}}
RAW = [json.dumps(BODY).encode(), json.dumps(BODY, ensure_ascii=False, indent=2).encode()]


def counted(tree: Any) -> tuple[int, int]:
    """Lists, objects and strings in ``tree``, and commas."""
    if not isinstance(tree, list | dict):
        return int(isinstance(tree, str)), 0
    children = tree if isinstance(tree, list) else [*tree, *tree.values()]
    items, commas = zip((0, 0), *map(counted, children), strict=True)
    return 1 + sum(items), max(0, len(tree) - 1) + sum(commas)


@pytest.mark.parametrize("raw", RAW)
@pytest.mark.parametrize("num_bytes", [1, 2, 3, 1000])
def test_marks_in_strings_are_text_wherever_pieces_end(raw: bytes, num_bytes: int) -> None:
    size = JsonSize(GatewayConfig())
    for start in range(0, len(raw), num_bytes):
        size.add(raw[start : start + num_bytes])
    assert (size._num_items + size._num_quotes // 2, size._num_values) == counted(BODY)


def body(num_messages: int, num_ids: int) -> bytes:
    part = {"type": "text", "text": "Hi"}
    messages = [{"role": "user", "content": [part]}] * num_messages
    return json.dumps({"messages": messages, "ids": [49151] * num_ids}).encode()


def test_as_many_messages_and_ids_as_are_allowed_fit() -> None:
    config = GatewayConfig()
    size = JsonSize(config)
    size.add(body(config.max_messages - 1, config.max_values - 4 * config.max_messages))
    assert size.refusal is None


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"[" + b",".join([b"[]"] * ITEMS_A_MESSAGE) + b"]", "lists, objects and strings"),
        (b"[" + b",".join([b"1"] * 1026) + b"]", "values"),
        (b"[" + b"9" * 9000 + b"]", "values"),
    ],
)
def test_one_too_many_is_told_of(raw: bytes, told: str) -> None:
    size = JsonSize(GatewayConfig(max_messages=1, max_values=1024))
    size.add(raw)
    assert size.refusal is not None and told in size.refusal.message
