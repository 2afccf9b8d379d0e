"""GET /openapi.json: the document is complete and valid, and says what the server takes and answers."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jsonschema
import pytest
from doc_blocks import Block, live_blocks
from openapi_schemas import errors_of
from starlette.routing import Route

from shoal.api.access import OPEN
from shoal.api.http_app import create_app
from shoal.api.intake import Services
from shoal.api.keys import Keyring, KeysFile, write_keys
from shoal.api.openapi import openapi_document
from shoal.api.schema import Body, ChatBody, CompletionBody, parse
from shoal.errors import InvalidRequest
from shoal.telemetry import Target, targets_document

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture
def document(services: Services) -> dict[str, Any]:
    return openapi_document(services)


# --- the document ---------------------------------------------------------------------------------------


def test_every_route_is_in_it_and_nothing_else(services: Services, document: dict[str, Any]) -> None:
    routes = [route for route in create_app(services).routes if isinstance(route, Route)]
    assert len(routes) == len(create_app(services).routes) > 8
    there = {(path, method.upper()) for path, item in document["paths"].items() for method in item}
    assert there == {(route.path.replace(":path}", "}"), method) for route in routes for method in route.methods or ()}


@pytest.mark.slow
def test_it_is_openapi(document: dict[str, Any]) -> None:
    import schemathesis

    schemathesis.openapi.from_dict(document).validate()
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_it_says_where_keys_are_wanted(document: dict[str, Any], services: Services, tmp_path: Path) -> None:
    write_keys(tmp_path / "keys.yaml", KeysFile())
    guarded = replace(services, keyring=Keyring(tmp_path / "keys.yaml"))
    assert document["security"] == [] and document["servers"] == [{"url": "/"}]
    assert openapi_document(guarded, "/llm")["servers"] == [{"url": "/llm"}]
    wanting = openapi_document(guarded)
    assert wanting["security"] == [{"key": []}]
    open_paths = {path for path, item in wanting["paths"].items() if "security" in next(iter(item.values()))}
    assert open_paths == {path for path in OPEN if not path.startswith("/grpc")}


COMPLETION = {"model": "smollm2", "prompt": "Hello"}
CHAT_BODY = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("name", "body", "field", "most", "more"),
    [
        ("CompletionBody", COMPLETION, "model", "smollm2", "gpt-5"),
        ("CompletionBody", COMPLETION, "n", 16, 17),
        ("CompletionBody", COMPLETION, "prompt_logprobs", 20, 21),
        ("CompletionBody", COMPLETION, "stop", ["a"] * 4, ["a"] * 5),
        ("CompletionBody", COMPLETION, "stop", ["a" * 256], ["a" * 257]),
        ("CompletionBody", COMPLETION, "prompt", ["a"] * 4, ["a"] * 5),
        ("CompletionBody", COMPLETION, "prompt", [49151] * 400, [49151] * 401),
        ("CompletionBody", COMPLETION, "prompt", [[49151] * 400], [[49151] * 401]),
        ("CompletionBody", COMPLETION, "prompt", [[0]], [[-1]]),
        ("CompletionBody", COMPLETION, "best_of", 1, 2),
        ("ChatBody", CHAT_BODY, "top_logprobs", 20, 21),
        ("ChatBody", CHAT_BODY, "logprobs", True, 1),
        ("ChatBody", CHAT_BODY, "messages", CHAT_BODY["messages"] * 400, CHAT_BODY["messages"] * 401),
        ("ChatBody", CHAT_BODY, "modalities", ["text"], ["audio"]),
    ],
)
def test_it_tells_this_servers_limits(
    document: dict[str, Any], name: str, body: dict[str, Any], field: str, most: Any, more: Any
) -> None:
    assert errors_of(document, name, body | {field: most}) == []
    assert errors_of(document, name, body | {field: more}) != []


def assert_agreed(document: dict[str, Any], kind: type[Body], body: dict[str, Any]) -> None:
    """The document and the validator take ``body``, or neither does."""
    try:
        parse(kind, json.dumps(body).encode())
        is_taken = True
    except InvalidRequest:
        is_taken = False
    assert (errors_of(document, kind.__name__, body) == []) == is_taken, body


SCALARS = (None, True, False, 0, 1, 2, 1.5, "", "a", "none", "auto", "text")
VALUES = (*SCALARS, [], [0], ["a"], ["text"], {}, {"type": "text"}, {"include_usage": True}, {"speed": True})


@pytest.mark.parametrize(("kind", "body"), [(CompletionBody, COMPLETION), (ChatBody, CHAT_BODY)])
def test_each_field_takes_what_it_says(document: dict[str, Any], kind: type[Body], body: dict[str, Any]) -> None:
    for name in kind.model_fields.keys() - {"model"} | {"nonsense"}:
        for value in VALUES:
            assert_agreed(document, kind, body | {name: value})


def bodies() -> list[Any]:
    """The documented calls with a body."""
    blocks = live_blocks("README.md", "docs/api.md")
    return [pytest.param(block, id=str(block)) for block in blocks if "-d '{" in block.text]


@pytest.mark.parametrize("block", bodies())
def test_what_the_documents_send_and_get_is_what_it_says(document: dict[str, Any], block: Block) -> None:
    words = shlex.split(block.text)
    [url] = (word for word in words if word.startswith("http"))
    operation = document["paths"][urlsplit(url).path]["post"]
    of_body, of_answer = (
        part["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for part in (operation["requestBody"], operation["responses"]["200"])
    )
    body = json.loads(words[words.index("-d") + 1])
    wrong = errors_of(document, of_body, body)
    answer = block.answer or ""
    if answer.startswith("data: "):
        *events, end = [event.removeprefix("data: ") for event in answer.split("\n\n") if event.strip()]
        assert end.strip() == "[DONE]"
        assert [errors_of(document, "CompletionChunk", json.loads(event)) for event in events] == [[]] * len(events)
    elif answer:
        assert errors_of(document, "Error" if wrong else of_answer, json.loads(answer)) == []
    assert bool(wrong) == ("max_tokns" in body)


# --- the server -----------------------------------------------------------------------------------------


async def test_every_route_answers_as_it_says(services: Services, document: dict[str, Any]) -> None:
    """Those that generate are in test_fuzz.py."""

    async def targets() -> list[Any]:
        return [*targets_document([Target("127.0.0.1:22001", "decode", "decode-1")])]

    app = create_app(services, metrics_text=lambda: b"shoal_requests_in_flight 0\n", metrics_targets=targets)
    bodies = {"/tokenize": {"prompt": "Hello", "return_token_strs": True}, "/detokenize": {"tokens": [1]}}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        for path, item in document["paths"].items():
            if path in (COMPLETIONS, CHAT):
                continue
            [(method, operation)] = item.items()
            place = path.replace("{name}", "smollm2")
            response = await http.request(method.upper(), place, json=bodies.get(path))
            assert response.status_code == 200, path
            [(kind, content)] = operation["responses"]["200"]["content"].items()
            assert response.headers["content-type"].startswith(kind), path
            if kind == "application/json":
                assert errors_of(document, content["schema"], response.json()) == [], path
