"""What a client asks: prompt and options to protobuf.

What can't be put on the wire is refused here; whether the values make sense is for the server to say, which knows
the model and its own limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

from shoal.errors import InvalidRequest
from shoal.v1 import inference_pb2 as pb
from shoal.wire.messages import Depth

_DEPTHS = {Depth.AUTO: pb.DEPTH_AUTO, Depth.SHALLOW: pb.DEPTH_SHALLOW, Depth.FULL: pb.DEPTH_FULL}
_TURN_KEYS = {"role", "content"}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. ``role`` is system, user or assistant."""

    role: str
    content: str


Prompt = str | Sequence[int] | Sequence[Message | Mapping[str, str]]
"""Text or token ids, continued as they are; or a conversation, oldest turn first, put through the chat template.

A turn is a ``Message`` or ``{"role": …, "content": …}``.
"""


class GenerateOptions(TypedDict, total=False):
    """Keywords of ``generate`` and ``stream``. What is left out, or ``None``, has the server's default."""

    model: str | None
    """A name that ``models()`` gives; needed only where several are served."""
    max_tokens: int | None
    """Longest answer, in tokens. By default what the model's context holds; 0, with ``echo`` or ``prompt_logprobs``,
    for no answer."""
    n: int | None
    """How many answers."""
    seed: int | None
    """Makes sampling repeatable."""
    stop: str | Sequence[str] | None
    """Strings that end an answer; they aren't part of it."""
    temperature: float | None
    """0 always takes the likeliest token."""
    top_p: float | None
    """Sample from the likeliest tokens that have this probability together."""
    top_k: int | None
    """Sample from so many likeliest tokens; 0: from all."""
    min_tokens: int | None
    """The end token isn't taken before so many tokens."""
    ignore_eos: bool | None
    """Go on after the end token."""
    logprobs: int | None
    """Report each token's log-probability, and so many alternatives."""
    depth: Depth | str | None
    """How deep the prompt is encoded: auto, shallow or full."""
    echo: bool | None
    """Begin each answer with the prompt; with ``logprobs``, tell the prompt's as well. Needs full depth."""
    prompt_logprobs: int | None
    """Report the log-probability of each prompt token but the first, and so many alternatives. Needs full depth."""


def to_request(prompt: Prompt, options: Mapping[str, Any]) -> pb.GenerateRequest:
    """The message for ``prompt`` and ``options`` (of ``GenerateOptions``).

    Raises TypeError for an unknown keyword or a value of another type, InvalidRequest for a value that can't be sent.
    """
    request = pb.GenerateRequest()
    _set_prompt(request, prompt)
    for name, value in options.items():
        if name not in GenerateOptions.__annotations__:
            known = ", ".join(GenerateOptions.__annotations__)
            raise TypeError(f"there is no keyword {name}: there are {known}, timeout_s and request_id")
        if value is not None:
            _set_option(request, name, value)
    return request


def _set_option(request: pb.GenerateRequest, name: str, value: Any) -> None:
    try:
        match name:
            case "stop":
                request.stop.extend([value] if isinstance(value, str) else value)
            case "depth":
                request.depth = _DEPTHS[Depth(value)]
            case _:
                setattr(request, name, value)
    except TypeError as error:
        wanted = GenerateOptions.__annotations__[name].__forward_arg__
        raise TypeError(f"{name} must be {wanted}, not {value!r}") from error
    except ValueError as error:
        raise InvalidRequest(f"{name} can't be {value!r}: {error}", param=name) from error


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        with _encoding("prompt"):
            request.text = prompt
        return
    given: object = prompt  # typed or not, callers err
    if not isinstance(given, Sequence) or isinstance(given, (bytes, bytearray, memoryview)):
        raise _no_prompt(f"not {type(prompt).__name__}")
    if not prompt:
        raise InvalidRequest("the prompt is empty: give text, token ids or messages", param="prompt")
    if all(type(item) is int for item in prompt):
        _set_token_ids(request, prompt)
    elif all(isinstance(item, (Message, Mapping)) for item in prompt):
        request.chat.messages.extend(_turn(item, at) for at, item in enumerate(prompt))
    else:
        raise _no_prompt(f"not a sequence of {', '.join(sorted({type(item).__name__ for item in prompt}))}")


def _set_token_ids(request: pb.GenerateRequest, token_ids: Sequence[Any]) -> None:
    try:
        request.token_ids.ids.extend(token_ids)
    except ValueError as error:
        raise InvalidRequest(f"the prompt holds a number that is no token id: {error}", param="prompt") from error


def _turn(turn: Any, at: int) -> pb.ChatMessage:
    if isinstance(turn, Message):
        turn = {"role": turn.role, "content": turn.content}
    if set(turn) != _TURN_KEYS:
        raise InvalidRequest(f"prompt[{at}] must have role and content, and nothing else", param=f"prompt[{at}]")
    if not all(isinstance(value, str) for value in turn.values()):
        raise TypeError(f"prompt[{at}]: role and content must be str")
    with _encoding(f"prompt[{at}]"):
        return pb.ChatMessage(role=turn["role"], content=turn["content"])


@contextmanager
def _encoding(param: str) -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{param} is no text at {error.start}: {error.reason}", param=param) from error


def _no_prompt(instead: str) -> TypeError:
    return TypeError(f"the prompt must be a str, a sequence of int, or a sequence of messages, {instead}")
