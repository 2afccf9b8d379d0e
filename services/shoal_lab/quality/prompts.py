"""Prompts as token ids: those that come with Shoal, or the user's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from shoal.errors import DataError, TooLittleText
from shoal_lab.quality.texts import opening, read

Prompt = tuple[int, ...]

_HELD_OUT_EVERY = 5
# The end of a text that is shorter than this is left out.
_MIN_WINDOW_TOKENS = 16


def shipped_prompts(tokenizer: Any) -> list[Prompt]:
    """Questions, tasks, code, and short documents with a question: asked as a chat where the model has a template."""
    lines = (resources.files("shoal_lab") / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    if not tokenizer.chat_template:
        return [tuple(tokenizer.encode(text)) for text in texts]
    return [_chat(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def read_prompts(path: Path, tokenizer: Any, *, max_tokens: int) -> list[Prompt]:
    """A .txt file is cut into windows of ``max_tokens``; a .jsonl file has a ``prompt`` or ``messages`` a line.

    Raises DataError that names the place, and what to change.
    """
    start = opening(tokenizer)
    documents = [
        ids if tuple(ids[: len(start)]) == start else [*start, *ids]
        for ids in read(path, tokenizer).token_ids(tokenizer)
    ]
    prompts = _windows(documents[0], start, max_tokens) if path.suffix == ".txt" else [*map(tuple, documents)]
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > max_tokens:
            raise DataError(
                f"{path}, prompt {number}: {len(prompt)} tokens, and {max_tokens} are allowed: shorten it, or raise "
                "--prompt-tokens"
            )
    if len(prompts) < 2:
        raise TooLittleText(
            f"{path} gives too few prompts ({len(prompts)}): 2 are the least, one to learn from, one to check"
        )
    return prompts


def held_out(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts to learn from, prompts to check with): every fifth is kept for checking."""
    every = min(_HELD_OUT_EVERY, len(prompts))
    checked = range(every - 1, len(prompts), every)
    return [prompt for index, prompt in enumerate(prompts) if index not in checked], [prompts[at] for at in checked]


def digest_of(prompts: Sequence[Prompt]) -> str:
    """SHA-256 (hex) of the token ids."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def _windows(ids: Sequence[int], start: Prompt, max_tokens: int) -> list[Prompt]:
    body, size = ids[len(start) :], max(_MIN_WINDOW_TOKENS, max_tokens - len(start))
    windows = [body[first : first + size] for first in range(0, len(body), size)]
    return [(*start, *window) for window in windows if len(window) >= _MIN_WINDOW_TOKENS]


def _chat(tokenizer: Any, messages: list[Any]) -> Prompt:
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
