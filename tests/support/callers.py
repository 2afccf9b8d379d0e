"""The SDK's two clients behind one face, so that one test looks at both. Each call has a client of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from shoal.client import AsyncClient, Client, Completion, Delta, Model, Usage

_Result = TypeVar("_Result")


class Caller:
    """Makes calls with ``Client``."""

    def __init__(self, target: str, **settings: Any) -> None:
        self.target = target
        self.settings = settings

    def generate(self, prompt: Any = "The sea is", **options: Any) -> Completion:
        with Client(self.target, **self.settings) as client:
            return client.generate(prompt, **options)

    def stream(self, prompt: Any = "The sea is", *, into: list[Delta] | None = None, **options: Any) -> Usage | None:
        """Appends the deltas to ``into``, also those before a failure."""
        deltas = [] if into is None else into
        with Client(self.target, **self.settings) as client, client.stream(prompt, **options) as stream:
            deltas.extend(stream)
            return stream.usage

    def models(self) -> tuple[Model, ...]:
        with Client(self.target, **self.settings) as client:
            return client.models()

    def is_ready(self) -> bool:
        with Client(self.target, **self.settings) as client:
            return client.is_ready()


class AsyncCaller(Caller):
    """Makes calls with ``AsyncClient``, each on an event loop of its own."""

    def generate(self, prompt: Any = "The sea is", **options: Any) -> Completion:
        return self._run(lambda client: client.generate(prompt, **options))

    def stream(self, prompt: Any = "The sea is", *, into: list[Delta] | None = None, **options: Any) -> Usage | None:
        deltas = [] if into is None else into

        async def read(client: AsyncClient) -> Usage | None:
            async with client.stream(prompt, **options) as stream:
                async for delta in stream:
                    deltas.append(delta)
                return stream.usage

        return self._run(read)

    def models(self) -> tuple[Model, ...]:
        return self._run(lambda client: client.models())

    def is_ready(self) -> bool:
        return self._run(lambda client: client.is_ready())

    def _run(self, use: Callable[[AsyncClient], Coroutine[Any, Any, _Result]]) -> _Result:
        async def main() -> _Result:
            async with AsyncClient(self.target, **self.settings) as client:
                return await use(client)

        return asyncio.run(main())
