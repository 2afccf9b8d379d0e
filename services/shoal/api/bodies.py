"""How much memory request bodies take, for the process and each key, from first byte to the end of their answers."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

from shoal.api.access import ANYBODY
from shoal.api.keys import Tenant
from shoal.config import GatewayConfig
from shoal.errors import Overloaded, RateLimited

TURN_S = 5.0
"""How long a message waits until others have been read."""

_RETRY_AFTER_S = 1.0


class Bodies:
    """Under the limits of ``config``. Without keys, everybody is one tenant, whom the process' own limit binds."""

    def __init__(self, config: GatewayConfig) -> None:
        self._most_bytes = config.max_bodies * config.max_body_bytes
        self._most_bytes_of_key = config.max_key_bodies * config.max_body_bytes
        self._num_bytes: Counter[Tenant] = Counter()
        self._turns = asyncio.Semaphore(config.max_bodies)
        self._turns_of_key = defaultdict[Tenant, asyncio.Semaphore](lambda: asyncio.Semaphore(config.max_key_bodies))

    @property
    def num_bytes(self) -> int:
        return self._num_bytes.total()

    @contextmanager
    def held(self, tenant: Tenant, num_bytes: int) -> Iterator[None]:
        """Count them for the block. Raises RateLimited or Overloaded where they are too many."""
        if tenant is not ANYBODY and self._num_bytes[tenant] + num_bytes > self._most_bytes_of_key:
            raise RateLimited("requests of yours are as large as may be: wait for one", retry_after_s=_RETRY_AFTER_S)
        if self.num_bytes + num_bytes > self._most_bytes:
            raise Overloaded(
                "the requests that are here are as large as may be: try again later", retry_after_s=_RETRY_AFTER_S
            )
        self._num_bytes[tenant] += num_bytes
        try:
            yield
        finally:
            self._num_bytes[tenant] -= num_bytes

    @asynccontextmanager
    async def turn(self, tenant: Tenant) -> AsyncIterator[None]:
        """For the block, read a message whose size nobody knows before. Raises Overloaded if the turn doesn't come."""
        turns = [self._turns] if tenant is ANYBODY else [self._turns_of_key[tenant], self._turns]
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(TURN_S):
                    for one in turns:
                        await stack.enter_async_context(one)
            except TimeoutError:
                raise Overloaded("too many messages are coming: try again later") from None
            yield
