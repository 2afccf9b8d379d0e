"""A stream that is waited for until a deadline, and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from shoal.errors import DeadlineExceeded

T = TypeVar("T")


async def until_deadline(outputs: AsyncIterator[T], timeout_s: float) -> AsyncGenerator[T, None]:
    """``outputs`` as they come. Raises DeadlineExceeded for one that isn't there ``timeout_s`` after the start.

    Ending whatever makes ``outputs`` is left to the caller.
    """
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    while True:
        try:
            async with asyncio.timeout_at(deadline_s) as wait:
                output = await anext(outputs)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            if not wait.expired():
                raise
            raise DeadlineExceeded("the request's deadline has passed") from error
        yield output
