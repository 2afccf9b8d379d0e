"""Text to token ids and back, with the model's own tokenizer and chat template.

Short texts are encoded where they are; long ones on a thread, so that the event loop goes on serving.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, TypeVar

from jinja2 import TemplateError
from tokenizers.decoders import ByteLevel

from shoal.api.schema import Message
from shoal.engine.detokenizer import decode_with
from shoal.errors import ContextLengthExceeded, InvalidRequest
from shoal.process.heartbeat import Heartbeat, SingleThread
from shoal.wire.messages import PromptOutline

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

_log = logging.getLogger(__name__)

# About a millisecond's work.
MAX_INLINE_CHARS = 4096
# What the template does for a message takes as long as encoding so many characters.
_MESSAGE_CHARS = 64
_MAX_MERGED_TOKENS = 2
_NO_THINKING = {"enable_thinking": False}  # Qwen3's, and others' since


class Tokenizer:
    """Safe to call from several tasks: encoding changes nothing in the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, max_inline_chars: int = MAX_INLINE_CHARS) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer's file may ask for these; a prompt is never cut or filled up behind the client's back.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._decode = decode_with(self._backend)
        added = self._backend.get_added_tokens_decoder().items()
        self._special_texts: dict[int, str] = {token_id: token.content for token_id, token in added if token.special}
        self._longest_token_bytes = _longest_token_bytes(self._backend)
        self._max_inline_chars = max_inline_chars
        self._thread = SingleThread("tokenizer")

    @property
    def vocab_size(self) -> int:
        """Token ids are below this; added tokens count."""
        return len(self._tokenizer)

    @property
    def heartbeat(self) -> Heartbeat:
        """The thread's."""
        return self._thread.heartbeat

    async def encode(
        self, text: str, *, max_tokens: int | None = None, add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Ids of ``text``, with the special tokens that the tokenizer puts around a text unless they aren't wanted.

        Raises ContextLengthExceeded, without encoding it, for a text of more bytes than ``max_tokens`` could stand
        for. A shorter one may still have more tokens.
        """

        def work() -> tuple[int, ...]:
            self._check_fits(text, max_tokens, "prompt")
            return self._encode(text, add_special_tokens=add_special_tokens)

        return await self._run(len(text), work)

    async def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        may_think: bool = True,
        opens_answer: bool = True,
    ) -> tuple[int, ...]:
        """Ids of a conversation up to where the assistant speaks, if it's to. ``max_tokens`` is as for ``encode``; a
        template that has a way not to think before an answer takes it unless the assistant ``may_think``.

        Raises InvalidRequest if the template refuses it.
        """

        options = {**({} if may_think else _NO_THINKING), **({} if opens_answer else {"opens_answer": False})}

        def work() -> tuple[int, ...]:
            text = self.render(messages, **options)
            self._check_fits(text, max_tokens, "messages")
            return self._encode(text, add_special_tokens=False)  # the template writes the special tokens itself

        return await self._run(_num_chars(messages), work)

    async def outline_chat(
        self, messages: Sequence[Message], ids: Sequence[int], *, may_think: bool = True
    ) -> PromptOutline:
        """The parts of ``ids``, which ``encode_chat`` made of the same. What can't be told is 0.

        The system prompt is all that stays the same whatever the first one says who isn't the system: a template's own
        counts, and so does what it writes before a user's words.
        """

        options = {} if may_think else _NO_THINKING

        def work() -> PromptOutline:
            told = self._ids_of(messages, opens_answer=False, **options)
            num_shared = _num_shared(told, ids)
            # Where the texts meet, a token may reach over. A template that begins otherwise tells nothing.
            is_beginning = bool(told) and len(told) - num_shared <= _MAX_MERGED_TOKENS
            num_header_tokens = len(ids) - num_shared if is_beginning else 0
            # If all messages are the system's, the header is the same in both prompts, too.
            num_same = _num_shared(self._ids_of(_otherwise(messages), **options), ids)
            return PromptOutline(min(num_same, len(ids) - num_header_tokens), num_header_tokens)

        return await self._run(2 * _num_chars(messages), work)

    def render(self, messages: Sequence[Message], *, opens_answer: bool = True, **options: bool) -> str:
        """A conversation as the text that the model was trained on, to where the assistant speaks if it's to. Of
        ``options``, a template looks at those that it knows."""
        if not self._tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template: send a prompt instead of messages", param="messages")
        turns = [message.model_dump(include={"role", "content", "name"}, exclude_none=True) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=opens_answer, **options
            )
        except (TemplateError, ValueError, TypeError) as error:
            if type(error) is TemplateError:  # raise_exception of the template; what else goes wrong is of a kind of it
                why = f"the model's chat template refuses them: {error}"
            else:
                _log.warning("a chat template failed", exc_info=error)
                why = "the model's chat template can't render them"
            raise InvalidRequest(f"messages: {why}", param="messages") from None
        return str(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; what the detokenizer reads."""
        return self._decode(ids)

    async def decode_whole(self, ids: Sequence[int]) -> str:
        """Text with special tokens as they are written."""

        def work() -> str:  # not ``decode``, for the reason that _encode has
            [text] = self._backend.decode_batch([list(ids)], skip_special_tokens=False)
            return str(text)

        return await self._run(len(ids), work)

    async def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it, which is no text: bytes may be letters of another alphabet."""
        return await self._run(len(ids), lambda: [self._backend.id_to_token(one) or "" for one in ids])

    @property
    def about(self) -> dict[str, str | None]:
        """What a client must know to render conversations itself: the template, and the special tokens it may name."""
        special = self._tokenizer.special_tokens_map
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        template = self._tokenizer.chat_template
        if isinstance(template, dict):  # several, of which conversations are rendered by this one
            template = template.get("default")
        return {
            "tokenizer_class": type(self._tokenizer).__name__,
            "chat_template": template if isinstance(template, str) else None,
            **{name: special.get(name) for name in names},
        }

    def special_text(self, token_id: int) -> str:
        """How a special token is written, which ``decode`` leaves out; nothing for any other token."""
        return self._special_texts.get(token_id, "")

    def close(self) -> None:
        """End the thread. Twice is a no-op."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _ids_of(self, messages: Sequence[Message], **options: bool) -> tuple[int, ...]:
        """Nothing, if the template refuses them."""
        try:
            return self._encode(self.render(messages, **options), add_special_tokens=False)
        except InvalidRequest:
            return ()

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        # Not ``encode``, which would hold the interpreter's lock, and so the event loop, all along.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)

    def _check_fits(self, text: str, max_tokens: int | None, param: str) -> None:
        if max_tokens is None or self._longest_token_bytes is None:
            return
        num_bytes = len(text.encode())
        if num_bytes > max_tokens * self._longest_token_bytes:
            raise ContextLengthExceeded(
                f"{param}: {num_bytes} bytes are more than the model's context of {max_tokens} tokens can hold: "
                "shorten the prompt",
                param=param,
            )

    async def _run(self, num_chars: int, work: Callable[[], T]) -> T:
        if num_chars <= self._max_inline_chars:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _num_chars(messages: Sequence[Message]) -> int:
    return sum(len(message.content) + len(message.name or "") + _MESSAGE_CHARS for message in messages)


def _otherwise(messages: Sequence[Message]) -> list[Message]:
    """The same conversation, but for what the first one says who isn't the system."""
    other = list(messages)
    index = next((at for at, message in enumerate(messages) if message.role != "system"), None)
    if index is not None:
        says = "B" if messages[index].content.lstrip().startswith("A") else "A"
        other[index] = messages[index].model_copy(update={"content": says})
    return other


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _longest_token_bytes(backend: Backend) -> int | None:
    """The most bytes of text that one token stands for; ``None`` where that isn't known.

    It is where a text's bytes become tokens as they are: no normalizer that shortens it, no token for all unknown
    ones, none that takes the spaces around it too. Bytes that the vocabulary lacks count, though they are dropped.
    """
    added = backend.get_added_tokens_decoder().values()
    is_plain = backend.normalizer is None and isinstance(backend.decoder, ByteLevel)
    if not is_plain or any(token.lstrip or token.rstrip for token in added):
        return None
    # A byte-level vocabulary writes each byte as one character; added tokens are the text itself.
    written = map(len, backend.get_vocab(with_added_tokens=False))
    return max(*written, *(len(token.content.encode()) for token in added))
