"""Who names a request in its answer, where somebody before us may have done so."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse

from shoal.gateway.edge import RequestEdge


async def names(asked: str | None, *, proxy_echoes_id: bool) -> list[str]:
    """The ids that our own answer carries."""
    edge = RequestEdge(PlainTextResponse("hello"), proxy_echoes_id=proxy_echoes_id)
    headers = {} if asked is None else {"x-request-id": asked}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(edge), base_url="http://test") as client:
        answer = await client.get("/", headers=headers)
    return answer.headers.get_list("x-request-id")


@pytest.mark.parametrize(("asked", "is_sane"), [("mine-1", True), ("white space", False)])
async def test_an_id_that_the_proxy_puts_into_the_answer_is_not_put_there_twice(asked: str, is_sane: bool):
    found = await names(asked, proxy_echoes_id=True)
    assert found == [] if is_sane else (len(found) == 1 and found != [asked])


@pytest.mark.parametrize("asked", ["mine-1", "white space", None])
async def test_without_a_proxy_each_answer_names_its_request_once(asked: str | None):
    [found] = await names(asked, proxy_echoes_id=False)
    assert (found == asked) is (asked == "mine-1")


async def test_a_websocket_is_refused_before_anybody_looks_at_it() -> None:
    said: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def never(*_: Any) -> Any:
        raise AssertionError

    await RequestEdge(never)({"type": "websocket", "path": "/v1/models", "headers": []}, never, send)
    assert said == [{"type": "websocket.close", "code": 1008}]
