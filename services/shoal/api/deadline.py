"""How long a client is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shoal.errors import DeadlineExceeded

GRACE_S = 3.0
"""By so much later all that waits for decode has given up."""


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
