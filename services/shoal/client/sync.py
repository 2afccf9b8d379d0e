"""The client for programs without an event loop."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Self, Unpack

import grpc

from shoal.client.answers import StreamedAnswer, to_completion, to_models
from shoal.client.connection import (
    DEFAULT_MAX_ATTEMPTS,
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    HEALTH_METHOD,
    HEALTH_REQUEST,
    HEALTH_SERVING,
    Call,
    Connection,
)
from shoal.client.requests import GenerateOptions, Prompt, to_request
from shoal.client.tls import Tls
from shoal.client.values import Completion, Delta, Model
from shoal.errors import DeadlineExceeded, Unavailable
from shoal.v1 import inference_pb2 as pb
from shoal.v1.inference_pb2_grpc import InferenceServiceStub


class Client:
    """Calls the server at ``target`` (``host:port``). Threads may share one; close it, or use it in a ``with``.

    A call takes at most ``timeout_s`` with all its attempts; there are up to ``max_attempts`` (1 to 5) if the server
    can't be reached or is overloaded, and none after the first token. ``api_key`` goes with each call; over plain
    text only to this machine, unless ``allow_plain_text_key``. Raises ConfigError for settings that can't work.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: Tls | None = None,
        api_key: str | None = None,
        allow_plain_text_key: bool = False,
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
    ) -> None:
        self._connection = Connection(target, timeout_s, tls, api_key, allow_plain_text_key, max_attempts)
        self._channel = self._connection.dial(grpc.insecure_channel, grpc.secure_channel)
        self._stub = InferenceServiceStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """The whole answer. Raises a ShoalError for what went wrong, TypeError for arguments that aren't any."""
        request, call = to_request(prompt, options), self._connection.call(timeout_s, request_id)
        with call.typed_errors():
            response = self._stub.Generate(request, timeout=call.timeout_s, metadata=call.metadata)
        return to_completion(response)

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """The answer as it is written. Raises as ``generate`` does, while it is read."""
        request, call = to_request(prompt, options), self._connection.call(timeout_s, request_id)
        messages = self._stub.GenerateStream(request, timeout=call.timeout_s, metadata=call.metadata)
        return Stream(messages, call)

    def models(self, *, timeout_s: float | None = None) -> tuple[Model, ...]:
        """What is served."""
        call = self._connection.call(timeout_s)
        with call.typed_errors():
            response = self._stub.ListModels(pb.ListModelsRequest(), timeout=call.timeout_s, metadata=call.metadata)
        return to_models(response)

    def is_ready(self, *, timeout_s: float | None = None) -> bool:
        """Whether the server is there and can answer; one that says nothing for ``timeout_s`` can't."""
        check = self._channel.unary_unary(HEALTH_METHOD, None, None)
        call = self._connection.call(timeout_s)
        try:
            with call.typed_errors():
                response: bytes = check(HEALTH_REQUEST, timeout=call.timeout_s, metadata=call.metadata)
        except (Unavailable, DeadlineExceeded):
            return False
        return response == HEALTH_SERVING

    def close(self) -> None:
        """End all calls; those that come after it raise Cancelled. Closing twice is fine."""
        self._connection.closed.set()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Stream(StreamedAnswer):
    """Deltas of one answer, in the order they were written.

    Leaving a loop over it in any way ends the call, and the server frees everything at once; so do ``close``, the end
    of a ``with``, and forgetting it. ``next`` takes a single delta and leaves the rest.
    """

    def __init__(self, messages: grpc.CallIterator[pb.GenerateStreamResponse], call: Call) -> None:
        super().__init__(call.request_id)
        self._messages = messages
        self._call = call

    def __iter__(self) -> Iterator[Delta]:
        # A generator is closed as soon as its loop is left, even while a variable or a traceback holds the stream.
        try:
            while (delta := next(self, None)) is not None:
                yield delta
        finally:
            self.close()

    def __next__(self) -> Delta:
        with self._call.typed_errors():
            return self._take(next(iter(self._messages)))

    def close(self) -> None:
        """End the call; any thread may. Nothing happens if it has ended."""
        self._messages.cancel()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
