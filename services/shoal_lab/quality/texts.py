"""Text to learn from and to measure on: what ships with Shoal, what users bring, and the passages cut from it.

Four kinds ship, each in two splits from different works (data/texts/SOURCES.md): whoever calibrates on some kinds and
evaluates on another never sees, in any split, what he's measured on.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from shoal.errors import DataError, TooLittleText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Kind(enum.StrEnum):
    """What sort of text ships."""

    PROSE = "prose"
    TECHNICAL = "technical"
    DIALOGUE = "dialogue"
    CODE = "code"


class Split(enum.StrEnum):
    """Choices are to be made on the first, figures on the second (docs/quality.md says where it wasn't so)."""

    CALIBRATION = "calibration"
    EVALUATION = "evaluation"


@dataclass(frozen=True, slots=True)
class Text:
    """Documents that were read together. ``kind`` names them in reports; ``digest`` is the SHA-256 (hex) of the bytes.

    A document of messages is written out by a chat template, special tokens and all; any other is plain.
    """

    kind: str
    documents: tuple[str, ...]
    digest: str

    def token_ids(self, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
        """The ids of each document, without any special token that the tokenizer would put around it."""
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(self.documents), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]


@dataclass(frozen=True, slots=True)
class Passage:
    """A prompt, and how its author went on: token ids."""

    kind: str
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]


def load(kind: Kind, split: Split) -> Text:
    """Text that ships: one document."""
    data = (resources.files("shoal_lab") / "data" / "texts" / kind / f"{split}.txt").read_bytes()
    return Text(kind, (data.decode(),), _digest(data))


def read(path: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Text:
    """A user's text: a .txt file is one document, a .jsonl file one a line, with ``prompt`` or ``messages``.

    Messages are written out by the chat template of ``tokenizer``; if the last one isn't the assistant's, up to where
    the assistant speaks. Raises DataError that names the file, the line, and what to do.
    """
    if path.suffix not in {".txt", ".jsonl"}:
        raise DataError(f"{path} is neither .txt (one document) nor .jsonl (a prompt or messages a line): rename it")
    try:
        data = path.read_bytes()
        content = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} isn't UTF-8 (byte {error.start}): convert it, with iconv for instance") from error
    if path.suffix == ".txt":
        documents = [content.replace("\r\n", "\n")]
    else:
        documents = [
            _document(line, f"{path}, line {number}", tokenizer)
            for number, line in enumerate(content.split("\n"), start=1)
            if line.strip()
        ]
    if not any(document.strip() for document in documents):
        raise DataError(f"{path} is empty: write text into it")
    return Text(path.stem, tuple(documents), _digest(data))


def opening(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """What the tokenizer puts before every text: BoS, or nothing."""
    return tuple(token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id)


def passages(
    kind: str,
    documents: Sequence[Sequence[int]],
    *,
    num_prompt: int,
    num_continuation: int,
    limit: int,
    at_least: int = 1,
    opening: Sequence[int] = (),
    remedy: str = "give more text, or longer documents",
) -> list[Passage]:
    """At most ``limit`` passages of exactly these lengths in tokens, spread evenly over ``documents`` (token ids).

    No two overlap and none crosses documents; the same arguments give the same passages. Each prompt begins with
    ``opening``, which counts; a document that begins with it already has it once. Raises TooLittleText, which
    ends with ``remedy``, if there are fewer than ``at_least``.
    """
    size = num_prompt + num_continuation - len(opening)
    opening = tuple(opening)
    bodies = [ids[len(opening) :] if tuple(ids[: len(opening)]) == opening else ids for ids in documents]
    starts = [
        (document, slot * len(document) // num_slots)
        for document in bodies
        for num_slots in [len(document) // size]
        for slot in range(num_slots)
    ]
    if len(starts) < at_least:
        num_tokens = sum(map(len, bodies))
        raise TooLittleText(
            f"{kind}: {num_tokens:,} tokens in {_counted(len(documents), 'document')} hold "
            f"{_counted(len(starts), 'passage')} of {size:,}, and {at_least:,} are needed: {remedy}"
        )
    number = min(limit, len(starts))
    chosen = (starts[index * len(starts) // number] for index in range(number))
    cuts = ((*opening, *document[start : start + size]) for document, start in chosen)
    return [Passage(kind, cut[:num_prompt], cut[num_prompt:]) for cut in cuts]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _document(line: str, where: str, tokenizer: PreTrainedTokenizerFast | None) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} isn't JSON ({error}): write one object a line") from error
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise DataError(f'{where}: write an object with either "prompt" or "messages"')
    prompt = record["prompt"] if "prompt" in record else _rendered(record["messages"], where, tokenizer)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f'{where}: "prompt" must be text, and not empty')
    if any("\ud800" <= char <= "\udfff" for char in prompt):
        raise DataError(f"{where}: half of a surrogate pair is no character: remove it")
    return prompt


def _rendered(messages: Any, where: str, tokenizer: PreTrainedTokenizerFast | None) -> str:
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise DataError(f'{where}: "messages" must be a list of objects with "role" and "content", both text')
    if tokenizer is None or not tokenizer.chat_template:
        raise DataError(f'{where}: this model has no chat template to write messages out with: give a "prompt"')
    speaks_next = messages[-1]["role"] != "assistant"
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=speaks_next))
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(f"{where}: the model's chat template refuses the messages: {error}") from None


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
