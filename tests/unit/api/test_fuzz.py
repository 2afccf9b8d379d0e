"""Whatever is sent by HTTP is answered in OpenAI's shapes: by 200 or a refusal, never by a defect; and nothing stays.

Bodies come from the fields that the endpoints know: each has values that fit, values at and beyond its limits, and any
JSON at all. The document of an answer is read by OpenAI's own types, and by the server's own OpenAPI document.
"""

from __future__ import annotations

import asyncio
import json
import string
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from examples import examples
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openapi_schemas import errors_of

from shoal.api.http_app import create_app
from shoal.api.intake import Services
from shoal.api.openapi import openapi_document
from shoal.api.schema import Body, ChatBody, CompletionBody

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDPOINTS: dict[str, tuple[type[Body], type[Any], type[Any]]] = {
    COMPLETIONS: (CompletionBody, Completion, Completion),
    CHAT: (ChatBody, ChatCompletion, ChatCompletionChunk),
}
SCHEMAS = {COMPLETIONS: ("Completion", "CompletionChunk"), CHAT: ("ChatCompletion", "ChatCompletionChunk")}

texts = st.text(max_size=20)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
token_ids = st.lists(st.integers(0, 49151), min_size=1, max_size=8)
counts = st.none() | st.integers(1, 3) | st.integers(1, 16) | st.sampled_from([-1, 0, 17, 2**31, 2**63, 10**40])
flags = st.none() | st.booleans()
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "assistant", "tool"]), "content": texts | any_json},
    optional={"name": st.none() | texts, "tool_calls": st.sampled_from([None, [], [{}]]), "refusal": st.none()},
)
FITTING: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["smollm2", "smollm2", "smollm2", "smollm2", "gpt-5"]),
    "prompt": st.text(min_size=1, max_size=20)
    | texts
    | token_ids
    | st.lists(texts, min_size=1, max_size=5)
    | st.lists(token_ids, min_size=1, max_size=3),
    "messages": st.lists(turns, min_size=1, max_size=4),
    "stop": st.none() | texts | st.lists(texts, max_size=5),
    "temperature": st.none() | st.floats(-0.5, 2.5),
    "top_p": st.none() | st.floats(0, 1.1),
    "depth": st.sampled_from([None, "auto", "shallow", "full", "deep"]),
    "stream_options": st.none() | st.fixed_dictionaries({}, optional={"include_usage": flags, "speed": flags}),
    **dict.fromkeys(["max_tokens", "max_completion_tokens", "n", "seed", "top_k", "min_tokens"], counts),
    **dict.fromkeys(["prompt_logprobs", "top_logprobs"], counts),
    "logprobs": counts | flags,
    **dict.fromkeys(["stream", "ignore_eos", "echo"], flags),
}


@st.composite
def bodies(draw: st.DrawFn, kind: type[Body]) -> dict[str, Any]:
    """Most fields fit most of the time, or no body would ever get far."""
    names = draw(st.sets(st.sampled_from(sorted(kind.model_fields)), max_size=5)) | {"model", kind.prompt_field}
    wrong = draw(st.sampled_from([None, None, *sorted(names)]))
    body = {name: draw(any_json if name == wrong else FITTING.get(name, st.none())) for name in sorted(names)}
    return body | draw(st.sampled_from([{}, {}, {}, {"kv_transfer_params": {}}]))


class Caller:
    """Calls the application within this process."""

    def __init__(self, services: Services) -> None:
        self.loop = asyncio.new_event_loop()
        self.backend: Any = services.backend
        self.document = openapi_document(services)
        app = create_app(services)
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    def __call__(self, method: str, path: str, content: bytes = b"", headers: Any = None) -> httpx.Response:
        async def call() -> httpx.Response:
            async with asyncio.timeout(20):
                return await self._client.request(method, path, content=content, headers=headers)

        response = self.loop.run_until_complete(call())
        assert self.backend.num_running == 0
        return response


@pytest.fixture(scope="module")
def call(module_services: Services) -> Iterator[Caller]:
    caller = Caller(module_services)
    yield caller
    caller.loop.run_until_complete(caller._client.aclose())
    caller.loop.close()


def assert_refusal(document: Any) -> None:
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert document["error"]["type"] in {"invalid_request_error", "authentication_error", "permission_error"}
    assert isinstance(document["error"]["message"], str) and len(document["error"]["message"]) < 2000


def assert_answered(path: str, response: httpx.Response, own: dict[str, Any]) -> None:
    """In one of OpenAI's shapes, which ``own`` describes."""
    assert response.status_code in (200, 400, 404, 405, 413), response.text
    assert response.headers["x-request-id"]
    _, whole, chunk = ENDPOINTS[path]
    of_whole, of_chunk = SCHEMAS[path]
    if response.status_code != 200:
        assert_refusal(response.json())
        assert errors_of(own, "Error", response.json()) == []
    elif response.headers["content-type"].startswith("text/event-stream"):
        *events, end = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
        assert end == "[DONE]" and events
        for event in events:
            chunk.model_validate_json(event)
            assert errors_of(own, of_chunk, json.loads(event)) == []
    else:
        whole.model_validate_json(response.content)
        assert errors_of(own, of_whole, response.json()) == []


@examples(80, suppress_health_check=list(HealthCheck))
@given(data=st.data(), path=st.sampled_from([COMPLETIONS, CHAT]), timing=st.sampled_from([{}, {"x-shoal-timing": "1"}]))
def test_any_body_is_answered_or_refused(call: Caller, data: st.DataObject, path: str, timing: dict[str, str]) -> None:
    body = data.draw(bodies(ENDPOINTS[path][0]))
    assert_answered(path, call("POST", path, json.dumps(body).encode(), timing), call.document)


@examples(60, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from([COMPLETIONS, CHAT]),
    content=st.binary(max_size=200) | any_json.map(json.dumps).map(str.encode),
)
def test_what_is_no_body_is_refused(call: Caller, path: str, content: bytes) -> None:
    response = call("POST", path, content)
    assert response.status_code == 400
    assert_refusal(response.json())


headers = st.dictionaries(
    st.sampled_from(["x-request-id", "x-shoal-depth", "traceparent", "authorization", "content-type", "accept"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=60),
)


@examples(80, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
    path=st.sampled_from([COMPLETIONS, CHAT, *("/health", "/readyz", "/version", "/metrics", "/v1/models")])
    | st.text(string.printable, max_size=30).map(lambda text: "/v1/models/" + text)
    | st.text(max_size=30).map(lambda text: "/" + text),
    headers=headers,
)  # fmt: skip
def test_any_path_method_and_header_is_answered(call: Caller, method: str, path: str, headers: dict[str, str]) -> None:
    sent = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    response = call(method, quote(path), b'{"model": "smollm2", "prompt": "Hi", "messages": []}', sent)
    assert response.status_code in (200, 400, 404, 405), response.text
    assert response.headers["x-request-id"]
    if response.status_code != 200 and method != "HEAD":
        assert_refusal(response.json())


def test_bodies_get_far_often_enough(call: Caller) -> None:
    """Bodies that are all refused would show little."""
    statuses = []

    @examples(40, suppress_health_check=list(HealthCheck))
    @given(body=bodies(CompletionBody))
    def ask(body: dict[str, Any]) -> None:
        statuses.append(call("POST", COMPLETIONS, json.dumps(body).encode()).status_code)

    ask()
    assert statuses.count(200) > 10 and statuses.count(400) > 10
