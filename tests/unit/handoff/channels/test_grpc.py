"""The server's end of a gRPC stream, by a context that the test answers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fake_clock import settle

from shoal.errors import PeerGone
from shoal.handoff.base import Channel
from shoal.handoff.channels.grpc import add_handoff_service


class Context:
    """Its one read ends when the test says so, as gRPC's does when the call has ended."""

    def __init__(self) -> None:
        self.reading: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def read(self) -> bytes:
        return await self.reading


async def serve(context: Context, behaviour: Any) -> None:
    handlers: list[Any] = []
    add_handoff_service(SimpleNamespace(add_generic_rpc_handlers=handlers.extend), behaviour)  # type: ignore[arg-type]
    method = handlers[0].service(SimpleNamespace(method="/shoal.v1.HandoffService/Session"))
    await method.stream_stream(None, context)


@pytest.mark.parametrize("by_closing", [True, False])
async def test_a_read_under_way_is_left_to_grpc_when_its_end_closes(by_closing: bool) -> None:
    context, told = Context(), list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _, what: told.append(what))

    async def behaviour(channel: Channel) -> None:
        receiving = asyncio.ensure_future(channel.receive())
        await settle()
        if by_closing:
            await channel.close()
            with pytest.raises(PeerGone, match="closed"):
                await receiving
        else:
            receiving.cancel()
            await asyncio.wait([receiving])
            assert receiving.cancelled()

    await serve(context, behaviour)
    await settle()
    assert not context.reading.done(), "gRPC still reads into what belongs to it"
    context.reading.set_exception(RuntimeError("the call has ended"))
    await settle()
    assert not told
