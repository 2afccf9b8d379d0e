"""GET /openapi.json: the document is complete and valid, and schemathesis finds nothing that belies it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import schemathesis
from doc_blocks import ROOT, Block, live_blocks
from examples import IS_THOROUGH, examples
from http_server import serving
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.api.access import OPEN
from shoal.api.http_app import create_app
from shoal.api.intake import Services
from shoal.api.keys import Keyring, KeysFile, digest_of, new_key, write_keys
from shoal.api.openapi import openapi_document
from shoal.api.schema import Body, ChatBody, CompletionBody, parse
from shoal.api.tokenizer import Tokenizer
from shoal.config import GatewayConfig
from shoal.errors import InvalidRequest
from shoal.telemetry import Target, targets_document

TESTS = ROOT / "tests" / "support"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KEY, KEY_ID = new_key()
NUM_EXAMPLES, TIMEOUT_S = (300, 3000) if IS_THOROUGH else (10, 250)


@pytest.fixture
def document(services: Services) -> dict[str, Any]:
    return openapi_document(services)


@pytest.fixture
def guarded(services: Services, tmp_path: Path) -> Services:
    """Of a gateway that wants ``KEY``."""
    tenant = {"keys": {KEY_ID: digest_of(KEY)}, "roles": ["generate", "metrics"]}
    write_keys(tmp_path / "keys.yaml", KeysFile.model_validate({"tenants": {"one": tenant}}))
    return replace(services, keyring=Keyring(tmp_path / "keys.yaml"))


def errors_of(document: dict[str, Any], name: str, value: Any) -> list[str]:
    """What the schema ``name`` has against ``value``."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]


# --- the document ---------------------------------------------------------------------------------------


def test_every_route_is_in_it_and_nothing_else(services: Services, document: dict[str, Any]) -> None:
    routes = [route for route in create_app(services).routes if isinstance(route, Route)]
    assert len(routes) == len(create_app(services).routes) > 8
    there = {(path, method.upper()) for path, item in document["paths"].items() for method in item}
    assert there == {(route.path.replace(":path}", "}"), method) for route in routes for method in route.methods or ()}


def test_it_is_openapi(document: dict[str, Any]) -> None:
    schemathesis.openapi.from_dict(document).validate()
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    del document["paths"][COMPLETIONS]["post"]["responses"]["200"]["description"]
    with pytest.raises(Exception, match="required property"):
        schemathesis.openapi.from_dict(document).validate()


def test_all_that_it_refers_to_is_there_and_of_components_none_is_idle(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    named = {f"#/components/{kind}/{name}" for kind, items in document["components"].items() for name in items}
    used = {piece.partition('"')[0] for piece in text.split('"$ref": "')[1:]}
    assert used | {"#/components/securitySchemes/key"} == named


def test_it_says_where_keys_are_wanted(document: dict[str, Any], guarded: Services) -> None:
    assert document["security"] == []
    wanting = openapi_document(guarded)
    assert wanting["security"] == [{"key": []}]
    open_paths = {path for path, item in wanting["paths"].items() if "security" in next(iter(item.values()))}
    assert open_paths == {path for path in OPEN if not path.startswith("/grpc")}


async def test_behind_a_prefix_it_names_it(services: Services) -> None:
    assert openapi_document(services)["servers"] == [{"url": "/"}]
    assert openapi_document(services, "/llm")["servers"] == [{"url": "/llm"}]


def test_more_prompts_than_may_run_at_once_are_none_that_may_come(services: Services) -> None:
    few = replace(services, config=services.config.model_copy(update={"max_prompts": 64, "max_running": 2}))
    document = openapi_document(few)
    assert not errors_of(document, "CompletionBody", COMPLETION | {"prompt": ["a", "b"]})
    assert errors_of(document, "CompletionBody", COMPLETION | {"prompt": ["a", "b", "c"]})


COMPLETION = {"model": "smollm2", "prompt": "Hello"}
CHAT_BODY = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("name", "body", "field", "most", "more"),
    [
        ("CompletionBody", COMPLETION, "model", "smollm2", "gpt-5"),
        ("CompletionBody", COMPLETION, "n", 16, 17),
        ("CompletionBody", COMPLETION, "logprobs", 20, 21),
        ("CompletionBody", COMPLETION, "prompt_logprobs", 20, 21),
        ("CompletionBody", COMPLETION, "stop", ["a"] * 4, ["a"] * 5),
        ("CompletionBody", COMPLETION, "stop", "a" * 256, "a" * 257),
        ("CompletionBody", COMPLETION, "stop", ["a" * 256], ["a" * 257]),
        ("CompletionBody", COMPLETION, "prompt", ["a"] * 4, ["a"] * 5),
        ("CompletionBody", COMPLETION, "prompt", [[1]] * 4, [[1]] * 5),
        ("CompletionBody", COMPLETION, "prompt", [49151] * 400, [49151] * 401),
        ("CompletionBody", COMPLETION, "prompt", [49151], [49152]),
        ("CompletionBody", COMPLETION, "prompt", [[49151] * 400], [[49151] * 401]),
        ("CompletionBody", COMPLETION, "prompt", [[0]], [[-1]]),
        ("CompletionBody", COMPLETION, "best_of", 1, 2),
        ("CompletionBody", COMPLETION, "logit_bias", {}, {"1": 1}),
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


scalars = st.sampled_from(SCALARS)
parts = st.fixed_dictionaries({"type": st.just("text") | scalars, "text": scalars}, optional={"detail": scalars})
lists = st.lists(scalars | parts | st.lists(scalars, max_size=2), max_size=3)


@examples(200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=lists | st.lists(parts, max_size=2) | st.lists(st.lists(st.just(1) | scalars, max_size=2), max_size=2))
def test_so_do_fields_of_several_shapes(document: dict[str, Any], value: Any) -> None:
    assert_agreed(document, CompletionBody, COMPLETION | {"prompt": value})
    assert_agreed(document, CompletionBody, COMPLETION | {"stop": value})
    assert_agreed(document, ChatBody, CHAT_BODY | {"messages": [{"role": "user", "content": value}]})


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


class Watched:
    """``app``; how often a path was answered with a status and a type, and words of answers, which ``replaced`` spoils.

    A word and what takes its place are as long.
    """

    def __init__(self, app: ASGIApp, replaced: dict[bytes, bytes]) -> None:
        self.answers: Counter[tuple[str, int, str]] = Counter()
        self.words: Counter[bytes] = Counter()
        self._app = app
        self._replaced = replaced

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def seen(message: Message) -> None:
            body: bytes = message.get("body", b"")
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "").partition(";")[0]
                self.answers[scope["path"], message["status"], kind] += 1
            self.words.update(re.findall(rb'"(\w+)":', body))
            for old, new in self._replaced.items():
                body = body.replace(old, new)
            await send(message | {"body": body} if body else message)

        await self._app(scope, receive, seen)


@pytest.fixture
def small(guarded: Services, smollm2: Any) -> Iterator[Services]:
    """A gateway whose largest answers are small, and whose clock stands still: no deadline is too short."""
    [model] = guarded.models
    tokenizer = Tokenizer(smollm2)
    config = GatewayConfig(max_body_bytes=200_000, max_prompts=3, max_choices=3)
    model = replace(model, max_context_tokens=64)
    yield replace(guarded, tokenizer=tokenizer, config=config, models=(model,), clock=lambda: 0.0)
    tokenizer.close()


def run_schemathesis(
    services: Services, *arguments: str, replaced: dict[bytes, bytes] | None = None
) -> tuple[subprocess.CompletedProcess[str], Watched]:
    """A run that is the same each time, unless the profile is thorough; and what was answered.

    It has a process of its own, since it changes hypothesis for all that runs in the same one.
    """

    async def targets() -> list[Any]:
        return [*targets_document([Target("127.0.0.1:22001", "decode", "decode-1")])]

    app = create_app(services, metrics_text=lambda: b"shoal_requests_in_flight 0\n", metrics_targets=targets)
    watched = Watched(app, replaced or {})
    steady = ["--generation-database", "none"] if IS_THOROUGH else ["--generation-deterministic"]
    with serving(watched) as url:
        place = ["run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {KEY}"]
        command = [sys.executable, "-m", "schemathesis.cli", *place, "--no-color", *steady, *arguments]
        environment = os.environ | {"PYTHONPATH": str(TESTS)}
        done = subprocess.run(
            command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    backend: Any = services.backend
    assert backend.num_running == 0
    return done, watched


@pytest.mark.timeout(TIMEOUT_S + 60)
def test_schemathesis_finds_nothing_that_belies_it(small: Services) -> None:
    done, watched = run_schemathesis(small, "--phases", "coverage,fuzzing", "--max-examples", str(NUM_EXAMPLES))
    assert done.returncode == 0, done.stdout + done.stderr
    # What is always refused would show little.
    for path in (COMPLETIONS, CHAT):
        for status, kind in ((200, "application/json"), (200, "text/event-stream"), (400, "application/json")):
            assert watched.answers[path, status, kind] >= 5, watched.answers
    answered = {path for path, status, _ in watched.answers if status == 200}
    assert answered == {path.replace("{name}", "smollm2") for path in openapi_document(small)["paths"]}
    optional = {b"ttft_ms", b"prompt_logprobs", b"text_offset", b"top_logprobs", b"cached_tokens", b"stop_reason"}
    assert optional <= watched.words.keys(), watched.words


def test_wrong_answers_would_be_found(small: Services) -> None:
    replaced = {
        b'{"version"': b'{"versiom"',
        b'"code":"unknown_field"': b'"code":"unknown_filed"',
        b'"object":"text_completion","created"': b'"object":"test_completion","created"',
        b"data: [DONE]": b"data: [GONE]",
    }
    paths = ("--include-path", "/version", "--include-path", COMPLETIONS)
    done, _ = run_schemathesis(small, *paths, "--phases", "coverage", replaced=replaced)
    assert done.returncode == 1
    for found in ('"versiom"', "unknown_filed", "test_completion", "SSE event violates schema", "stream_has_an_end"):
        assert found in done.stdout, done.stdout
