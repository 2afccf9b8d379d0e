"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, Unpack

import grpc.aio

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
from shoal.errors import Cancelled, DeadlineExceeded, Unavailable
from shoal.v1 import inference_pb2 as pb
from shoal.v1.inference_pb2_grpc import InferenceServiceStub


class AsyncClient:
    """Calls the server at ``target`` (``host:port``). It belongs to the event loop that runs when it is made.

    Settings and methods are those of ``Client``. Cancelling a task ends the call that it waits for.
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
        asyncio.get_running_loop()  # without one, gRPC would take a loop that never runs
        self._channel = self._connection.dial(grpc.aio.insecure_channel, grpc.aio.secure_channel)
        self._stub = InferenceServiceStub(self._channel)

    async def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """The whole answer. Raises a ShoalError for what went wrong, TypeError for arguments that aren't any."""
        request, call = to_request(prompt, options), self._connection.call(timeout_s, request_id)
        with _typed_errors(call):
            response = await self._stub.Generate(request, timeout=call.timeout_s, metadata=call.metadata)
        return to_completion(response)

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """The answer as it is written. Raises as ``generate`` does, while it is read."""
        request, call = to_request(prompt, options), self._connection.call(timeout_s, request_id)
        messages = self._stub.GenerateStream(request, timeout=call.timeout_s, metadata=call.metadata)
        return AsyncStream(messages, call)

    async def models(self, *, timeout_s: float | None = None) -> tuple[Model, ...]:
        """What is served."""
        call = self._connection.call(timeout_s)
        with _typed_errors(call):
            response = await self._stub.ListModels(
                pb.ListModelsRequest(), timeout=call.timeout_s, metadata=call.metadata
            )
        return to_models(response)

    async def is_ready(self, *, timeout_s: float | None = None) -> bool:
        """Whether the server is there and can answer; one that says nothing for ``timeout_s`` can't."""
        check = self._channel.unary_unary(HEALTH_METHOD, None, None)
        call = self._connection.call(timeout_s)
        try:
            with _typed_errors(call):
                response: bytes = await check(HEALTH_REQUEST, timeout=call.timeout_s, metadata=call.metadata)
        except (Unavailable, DeadlineExceeded):
            return False
        return response == HEALTH_SERVING

    async def close(self) -> None:
        """End all calls; those that come after it raise Cancelled. Closing twice is fine."""
        self._connection.closed.set()
        await self._channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()


class AsyncStream(StreamedAnswer):
    """Deltas of one answer, in the order they were written.

    Leaving a loop over it in any way ends the call, and the server frees everything at once; so do ``close``, the end
    of an ``async with``, and forgetting it. ``anext`` takes a single delta and leaves the rest.
    """

    def __init__(
        self, messages: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateStreamResponse], call: Call
    ) -> None:
        super().__init__(call.request_id)
        self._messages = messages
        self._call = call

    async def __aiter__(self) -> AsyncIterator[Delta]:
        # The event loop closes a generator as soon as its loop is left, even while a variable holds the stream.
        try:
            while (delta := await anext(self, None)) is not None:
                yield delta
        finally:
            self._messages.cancel()

    async def __anext__(self) -> Delta:
        with _typed_errors(self._call):
            message = await self._messages.read()
        if not isinstance(message, pb.GenerateStreamResponse):  # EOF
            raise StopAsyncIteration
        return self._take(message)

    async def close(self) -> None:
        """End the call. Nothing happens if it has ended."""
        self._messages.cancel()

    def __del__(self) -> None:
        self._messages.cancel()  # gRPC's own call would be found by the garbage collector only

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()


@contextmanager
def _typed_errors(call: Call) -> Iterator[None]:
    """As ``call.typed_errors``. gRPC raises CancelledError also for a call that was ended, not only for a task."""
    try:
        with call.typed_errors():
            yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling() > 0:
            raise
        raise Cancelled("this client ended the call") from error
