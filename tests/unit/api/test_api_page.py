"""docs/api.md against the gateway itself: its calls are made, its tables compared with the code."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from doc_blocks import ROOT, Block, blocks, live_blocks, run
from google.protobuf import json_format, message_factory
from grpc_health.v1 import health_pb2
from inference_server import Inference

from shoal import client, errors
from shoal.api import refusals
from shoal.api.intake import Services
from shoal.api.openapi import openapi_document
from shoal.api.schema import IGNORED_FIELDS, Body, ChatBody, CompletionBody, StreamOptions, parse
from shoal.v1 import inference_pb2
from shoal.wire.statuses import from_status, status_code, to_status

PAGE = "docs/api.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
KINDS: dict[str, type[Body]] = {"chat": ChatBody, "completions": CompletionBody}
LEAST = {
    "chat": {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
    "completions": {"model": "m", "prompt": "Hi"},
}
# Errors that end a start or a command, and those of a hand-off, which the ladder of fallbacks deals with.
NOT_FOR_CLIENTS = (
    errors.ConfigError, errors.ModelError, errors.HandoffError, errors.DataError, errors.CalibrationError,
)  # fmt: skip
HTTP_ONLY = (refusals.InvalidJson, refusals.RouteNotFound, refusals.MethodNotAllowed)


def rows(*heading: str) -> list[list[str]]:
    """The cells of all tables whose headings begin so."""
    found = re.findall(rf"^\| {' [|] '.join(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for table in found for row in table.splitlines()]


def names(cell: str) -> list[str]:
    return re.findall("`(.*?)`", cell)


def endpoints(cell: str) -> list[str]:
    return list(KINDS) if cell == "both" else [cell]


# --- calls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", live_blocks("README.md", PAGE), ids=str)
async def test_what_the_documents_call_works(block: Block, gateway: Any, inference: Inference) -> None:
    http_port, grpc_port = (int(address.rpartition(":")[2]) for address in (gateway.url, inference.address))
    await asyncio.to_thread(run, block, http_port, grpc_port)


def grpcurl_calls() -> Iterator[tuple[str, str]]:
    """Each documented call with a method: its name and its JSON."""
    for block in blocks(PAGE):
        for line in block.text.splitlines() if block.text.startswith("grpcurl ") else ():
            words = shlex.split(line)
            if "/" in words[-1]:
                yield words[-1], words[words.index("-d") + 1] if "-d" in words else "{}"


def test_every_method_is_called_by_grpcurl() -> None:
    service = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
    called = {name for name, _ in grpcurl_calls()}
    assert called == {f"{service.full_name}/{method.name}" for method in service.methods} | {
        "grpc.health.v1.Health/Check"
    }


@pytest.mark.parametrize(("name", "request_json"), list(grpcurl_calls()))
def test_grpcurl_sends_what_the_method_takes(name: str, request_json: str) -> None:
    service, _, method = name.rpartition("/")
    pool = {"InferenceService": inference_pb2.DESCRIPTOR, "Health": health_pb2.DESCRIPTOR}
    file = pool[service.rpartition(".")[2]]
    descriptor = file.services_by_name[service.rpartition(".")[2]]
    assert descriptor.full_name == service
    request = message_factory.GetMessageClass(descriptor.methods_by_name[method].input_type)()
    json_format.Parse(request_json, request)


# --- fields ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", KINDS)
def test_every_field_is_listed_once(endpoint: str) -> None:
    tables = [*rows("field", "endpoint", "what it does"), *rows("field", "endpoint", "accepted")]
    listed = [name for row in tables if endpoint in endpoints(row[1]) for name in names(row[0])]
    assert sorted([*listed, *IGNORED_FIELDS]) == sorted(KINDS[endpoint].model_fields)


def test_the_ignored_fields_are_those_listed() -> None:
    [sentence] = re.findall(r"^Accepted, and without effect.*: (.*)$", TEXT, re.MULTILINE)
    assert set(names(sentence)) == IGNORED_FIELDS | {"stream_options.include_obfuscation"}
    anything = {"include_obfuscation": [1]}
    assert StreamOptions.model_validate(anything).include_obfuscation is None
    for endpoint, kind in KINDS.items():
        body = LEAST[endpoint] | {name: ["anything"] for name in IGNORED_FIELDS}
        assert parse(kind, json.dumps(body).encode()) == parse(kind, json.dumps(LEAST[endpoint]).encode())


def neutral_values() -> Iterator[tuple[str, str, list[object]]]:
    """Endpoint, field, and the values that ask for nothing."""
    for fields, where, accepted in rows("field", "endpoint", "accepted"):
        for endpoint in endpoints(where):
            for name in names(fields):
                yield endpoint, name, [json.loads(value) for value in names(accepted)]


@pytest.mark.parametrize(("endpoint", "name", "accepted"), list(neutral_values()))
def test_a_field_is_refused_unless_it_asks_for_nothing(endpoint: str, name: str, accepted: list[object]) -> None:
    def send(value: object) -> None:
        parse(KINDS[endpoint], json.dumps(LEAST[endpoint] | {name: value}).encode())

    for value in (None, *accepted):
        send(value)
    with pytest.raises(refusals.UnsupportedValue, match=name):
        send({"asks": "for something"})


# --- errors ---------------------------------------------------------------------------------------------


def kinds_of(kind: type[errors.ShoalError]) -> Iterator[type[errors.ShoalError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from kinds_of(below)


def test_the_table_of_errors_is_the_one_in_the_code() -> None:
    listed = {code: (row[0], names(row[2])) for row in rows("HTTP") for code in names(row[1])}
    shipped = [kind for kind in kinds_of(errors.ShoalError) if kind.__module__.startswith("shoal.")]
    assert listed == {
        kind.code: (str(kind.http_status), [] if issubclass(kind, HTTP_ONLY) else [status_code(kind("")).name])
        for kind in shipped
        if not issubclass(kind, NOT_FOR_CLIENTS)
    }


def test_the_table_of_errors_names_what_the_client_raises() -> None:
    def raised(kind: type[errors.ShoalError]) -> str:
        """The nearest class that the client exports."""
        found = type(from_status(to_status(kind("")))).__mro__
        return next(one.__name__ for one in found if getattr(client, one.__name__, None) is one)

    listed = {code: names(row[5]) for row in rows("HTTP") for code in names(row[1])}
    kinds = {kind for kind in kinds_of(errors.ShoalError) if kind.code in listed}
    assert listed == {kind.code: [] if issubclass(kind, HTTP_ONLY) else [raised(kind)] for kind in kinds}


def test_the_openapi_document_tells_the_same_errors(services: Services) -> None:
    listed = {(row[0], code) for row in rows("HTTP") for code in names(row[1])}
    elsewhere = {("404", refusals.RouteNotFound.code), ("405", refusals.MethodNotAllowed.code), ("499", "cancelled")}
    told = set()
    for status, response in openapi_document(services)["components"]["responses"].items():
        [_, known] = response["content"]["application/json"]["schema"]["allOf"]
        told |= {(status, code) for code in known["properties"]["error"]["properties"]["code"]["enum"]}
    assert told == listed - elsewhere


def test_what_is_worth_asking_again_is_what_has_retry_after() -> None:
    listed = {row[0] for row in rows("HTTP") if "retry-after" in row[4]}
    kinds = {kind for kind in kinds_of(errors.ShoalError) if kind.__module__.startswith("shoal.")}
    told = {str(kind.http_status) for kind in kinds if "retry-after" in refusals.error_response(kind("")).headers}
    assert listed == told
