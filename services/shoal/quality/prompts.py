"""Prompts as token ids: those that come with Shoal, or the user's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from shoal.errors import ConfigError

Prompt = tuple[int, ...]

_HELD_OUT_EVERY = 5
# The end of a text that is shorter than this is left out.
_MIN_WINDOW_TOKENS = 16


def shipped_prompts(tokenizer: Any) -> list[Prompt]:
    """Questions, tasks, code, and short documents with a question: asked as a chat where the model has a template."""
    lines = (resources.files("shoal") / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    if not tokenizer.chat_template:
        return [tuple(tokenizer.encode(text)) for text in texts]
    return [_chat(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def read_prompts(path: Path, tokenizer: Any, *, max_tokens: int) -> list[Prompt]:
    """A .txt file is cut into windows of ``max_tokens``; a .jsonl file has a ``prompt`` or ``messages`` a line.

    Raises ConfigError that names the line, and what to change.
    """
    read = {".txt": _windows, ".jsonl": _lines}.get(path.suffix)
    if read is None:
        raise ConfigError(f"{path} is neither .txt nor .jsonl: give one text, or a JSON object with prompt a line")
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (at byte {error.start}): convert it") from error
    prompts = read(path, text, tokenizer, max_tokens)
    if len(prompts) < 2:
        raise ConfigError(f"{path} gives {len(prompts)} prompts, and 2 are the least: one to learn from, one to check")
    return prompts


def held_out(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts to learn from, prompts to check with): every fifth is kept for checking."""
    every = min(_HELD_OUT_EVERY, len(prompts))
    checked = range(every - 1, len(prompts), every)
    return [prompt for index, prompt in enumerate(prompts) if index not in checked], [prompts[at] for at in checked]


def digest_of(prompts: Sequence[Prompt]) -> str:
    """SHA-256 (hex) of the token ids."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def _windows(_path: Path, text: str, tokenizer: Any, max_tokens: int) -> list[Prompt]:
    begin = tokenizer.encode("")  # what the tokenizer puts before any text
    ids = tokenizer.encode(text, add_special_tokens=False)
    size = max(_MIN_WINDOW_TOKENS, max_tokens - len(begin))
    windows = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [(*begin, *window) for window in windows if len(window) >= _MIN_WINDOW_TOKENS]


def _lines(path: Path, text: str, tokenizer: Any, max_tokens: int) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = _prompt(json.loads(line), tokenizer)
        except (ValueError, TypeError, KeyError, TemplateError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        if not 1 <= len(prompt) <= max_tokens:
            raise ConfigError(
                f"{path}, line {number}: a prompt of {len(prompt)} tokens, but 1 to {max_tokens} are allowed: "
                "shorten it, or raise --prompt-tokens"
            )
        prompts.append(prompt)
    return prompts


def _prompt(entry: Any, tokenizer: Any) -> Prompt:
    match entry:
        case {"prompt": str(text)}:
            return tuple(tokenizer.encode(text))
        case {"messages": [*messages]} if messages and tokenizer.chat_template:
            return _chat(tokenizer, messages)
        case {"messages": [*messages]} if messages:
            raise ValueError("the model has no chat template: give prompt instead of messages")
    raise ValueError('must be {"prompt": "…"} or {"messages": [{"role": …, "content": …}, …]}')


def _chat(tokenizer: Any, messages: list[Any]) -> Prompt:
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
