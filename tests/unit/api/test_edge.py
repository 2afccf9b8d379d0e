"""Who names a request in its answer, where somebody before us may have done so."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

from shoal.api.edge import RequestEdge, read_body
from shoal.api.json_size import JsonSize
from shoal.config import GatewayConfig
from shoal.errors import RequestTooLarge


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


async def body_of(declared: str, *, max_bytes: int = 10) -> bytes:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"a short one"[:max_bytes], "more_body": False}

    return await read_body(Headers({"content-length": declared}), receive, max_bytes, JsonSize(GatewayConfig()))


@pytest.mark.parametrize("declared", ["10", "", "a few", "-1", "1_000_000", "\xb2", "9" * 5000], ids=lambda it: it[:9])
async def test_a_length_that_says_nothing_is_passed_over_and_what_comes_is_counted(declared: str):
    assert await body_of(declared) == b"a short on"


@pytest.mark.parametrize("declared", ["1000000", "9" * 19])
async def test_a_length_far_beyond_the_most_is_refused_unread(declared: str):
    with pytest.raises(RequestTooLarge):
        await body_of(declared)
