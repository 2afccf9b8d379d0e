"""Waiting for what nobody tells of."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

_LOOK_AGAIN_S = 0.25


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again; whoever calls it sets a limit."""
    while not await holds():  # noqa: ASYNC110 - processes elsewhere set no event of ours
        await asyncio.sleep(_LOOK_AGAIN_S)
