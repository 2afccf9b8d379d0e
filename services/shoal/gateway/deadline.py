"""What is waited for until a deadline, and no longer: decode's outputs, and the client itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from shoal.errors import DeadlineExceeded

T = TypeVar("T")

GRACE_S = 3.0
"""By so much later all that waits for decode has given up."""


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


@asynccontextmanager
async def done_within(timeout_s: float) -> AsyncIterator[None]:
    """Raises DeadlineExceeded if the block isn't done ``GRACE_S`` after ``timeout_s``: then it waits for a client that
    doesn't send the rest of its request, or doesn't read its answer, and would hold its place for as long as it likes.
    """
    try:
        async with asyncio.timeout(timeout_s + GRACE_S) as wait:
            yield
    except TimeoutError as error:
        if not wait.expired():
            raise
        raise DeadlineExceeded("the request's deadline has passed") from error
