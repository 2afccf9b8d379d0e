"""Text to token ids and back, with the model's own tokenizer and chat template.

Short texts are encoded where they are; long ones on a thread, so that the event loop goes on serving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from jinja2 import TemplateError

from shoal.engine.detokenizer import decode_with
from shoal.errors import InvalidRequest
from shoal.gateway.schema import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

# About a millisecond's work.
MAX_INLINE_CHARS = 4096


class Tokenizer:
    """Safe to call from several tasks: encoding changes nothing in the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, max_inline_chars: int = MAX_INLINE_CHARS) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer's file may ask for these; a prompt is never cut or filled up behind the client's back.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._decode = decode_with(tokenizer)
        self._max_inline_chars = max_inline_chars
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    @property
    def vocab_size(self) -> int:
        """Token ids are below this; added tokens count."""
        return len(self._tokenizer)

    async def encode(self, text: str) -> tuple[int, ...]:
        """Ids of ``text`` with the special tokens that the tokenizer puts around a text."""
        return await self._run(len(text), lambda: self._encode(text, add_special_tokens=True))

    async def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of a conversation up to where the assistant speaks. Raises InvalidRequest if the template refuses it."""
        # The template writes the special tokens itself.
        size = sum(len(message.content) for message in messages)
        return await self._run(size, lambda: self._encode(self.render(messages), add_special_tokens=False))

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation as the text that the model was trained on."""
        if not self._tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template: use /v1/completions", param="messages")
        turns = [message.model_dump(include={"role", "content", "name"}, exclude_none=True) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(
                f"messages: the model's chat template refuses them: {error}", param="messages"
            ) from None
        return str(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; what the detokenizer reads."""
        return self._decode(ids)

    def close(self) -> None:
        """End the thread. Twice is a no-op."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    async def _run(self, num_chars: int, work: Callable[[], T]) -> T:
        if num_chars <= self._max_inline_chars:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
