"""How a served gRPC call reads its next message."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio


def start_read(context: grpc.aio.ServicerContext[Any, Any]) -> asyncio.Future[Any]:
    """The next message, or EOF. It must not be cancelled: gRPC reads into memory that a cancelled read gives back too
    early. The call's end ends it."""
    reading = asyncio.ensure_future(context.read())
    reading.add_done_callback(_retrieve)
    return reading


def _retrieve(reading: asyncio.Future[Any]) -> None:
    """Where nobody waits any more, asyncio would log that the exception was never retrieved."""
    if not reading.cancelled():
        reading.exception()
