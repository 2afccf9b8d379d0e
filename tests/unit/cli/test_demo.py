"""``shoal demo``, all but the cluster."""

from __future__ import annotations

import importlib
import json

import httpx
import pytest

from shoal.errors import InternalError

demo = importlib.import_module("shoal.cli.demo")

BROKEN_OFF = {"error": {"message": "decode has died"}}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx.Response(429, text="the queue is full"), "the gateway answered 429: the queue is full"),
        (httpx.Response(200, text=f"data: {json.dumps(BROKEN_OFF)}\n\n"), "the answer broke off: decode has died"),
    ],
    ids=["refused", "broken off"],
)
def test_an_answer_that_does_not_come_is_told(answer: httpx.Response, said: str) -> None:
    with (
        httpx.Client(base_url="http://test", transport=httpx.MockTransport(lambda _request: answer)) as client,
        pytest.raises(InternalError, match=said),
    ):
        demo._ask(client, "smollm2", "Hello", "shallow", 2)
