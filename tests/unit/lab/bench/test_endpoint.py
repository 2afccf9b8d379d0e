"""One request over real HTTP: what is sent, what is timed, and the name of everything that can go wrong."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import ssl
from typing import Any

import pytest
import trustme
from fake_backend import FakeBackend
from http_server import serving
from prometheus_client import CollectorRegistry
from scripted_endpoint import (
    DONE,
    HandClock,
    Request,
    Script,
    ScriptedEndpoint,
    Wire,
    event,
    scripted,
    token,
    usage,
    whole_answer,
)

from shoal.api.http_app import create_app
from shoal.api.intake import Services
from shoal.api.tokenizer import Tokenizer
from shoal.api.validation import ServedModel
from shoal.config import GatewayConfig
from shoal.errors import ConfigError, Unavailable
from shoal.model.files import locate
from shoal.telemetry import GatewayMetrics
from shoal_lab.bench.clock import Clock, RealClock
from shoal_lab.bench.endpoint import EndpointOptions, base_url, open_endpoint
from shoal_lab.bench.record import Failure, Record, TokenSource
from shoal_lab.bench.workload import PlannedRequest, PromptKind

REQUEST = PlannedRequest(5, "7:3", (1, 2, 3, 4, 5, 6, 7), 7, 3, arrival_s=1.5)


async def send(url: str, *, clock: Clock | None = None, origin_s: float = 0.0, **options: Any) -> Record:
    async with open_endpoint(EndpointOptions(url, **{"model": "m", **options}), clock or RealClock()) as endpoint:
        return await endpoint.send(REQUEST, endpoint.body(REQUEST), origin_s)


async def failure_of(script: Script, **options: Any) -> Record:
    async with scripted(script) as server:
        record = await send(server.url, **options)
    assert record.failure is not None and record.e2e_s is None
    return record


# --- an answer ------------------------------------------------------------------------------------------


async def test_times_are_those_at_which_chunks_came():
    clock = HandClock()

    async def script(request: Request, wire: Wire) -> None:
        await clock.looked()  # when the request was sent
        await wire.start()
        for now_s, data in ((12.0, token(" two words")), (12.5, token()), (13.5, token("", "length")), (99, usage())):
            clock.now_s = now_s
            await wire.send(data)
            await clock.looked()
        await wire.send(DONE)
        await wire.end()

    clock.now_s = 10.25
    async with scripted(script) as server:
        record = await send(server.url, clock=clock, origin_s=8.0)
    assert record.failure is None and record.detail == "" and record.status == 200
    assert (record.arrival_s, record.sent_s, record.ttft_s, record.e2e_s) == (1.5, 2.25, 1.75, 2.25)
    assert record.itl_s == (0.5,)
    assert (record.prompt_tokens, record.output_tokens, record.tokens_from) == (7, 3, TokenSource.USAGE)
    assert record.tpot_s == 0.25
    assert (record.index, record.kind, record.planned_tokens, record.max_tokens) == (5, "7:3", 7, 3)


async def test_nothing_behind_the_end_is_read():
    async def script(request: Request, wire: Wire) -> None:
        await wire.start()
        await wire.send(token() + DONE + b"data: {oops\n\n" + token() + event({"error": "late"}))
        await wire.end()

    async with scripted(script) as server:
        record = await send(server.url)
    assert (record.failure, record.output_tokens) == (None, 1)


async def test_a_server_that_does_not_hang_up_after_the_end_is_not_waited_for():
    async def script(request: Request, wire: Wire) -> None:
        await wire.start()
        await wire.send(token() + DONE)
        await wire.gone()

    async with scripted(script) as server:
        record = await send(server.url, timeout_s=10_000)
    assert (record.failure, record.output_tokens) == (None, 1)


@pytest.mark.parametrize(
    ("prompts", "path", "fields"),
    [
        (PromptKind.IDS, "/v1/completions", {"prompt": list(REQUEST.prompt)}),
        (PromptKind.CHAT, "/v1/chat/completions", {"messages": [{"role": "user", "content": list(REQUEST.prompt)}]}),
    ],
)
async def test_a_request_asks_for_a_stream_of_exactly_so_many_tokens(
    prompts: PromptKind, path: str, fields: dict[str, Any]
):
    async with scripted() as server:
        await send(
            server.url + "/v1/", prompts=prompts, api_key="secret", extra_body={"depth": "full", "temperature": 0.5}
        )
        [request] = server.requests
    assert (request.method, request.path) == ("POST", path)
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["content-type"] == "application/json"
    assert request.body == {
        "model": "m", **fields, "max_tokens": 3, "temperature": 0.5, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True, "depth": "full",
    }  # fmt: skip


async def test_a_server_is_told_how_long_a_request_may_take_if_it_is_to_know():
    async with scripted() as server:
        await send(server.url, timeout_s=7.5, tells_timeout=True)
        [request] = server.requests
    assert request.headers["x-shoal-timeout"] == "7.5"


async def test_connections_are_used_again():
    ports = set()

    async def script(request: Request, wire: Wire) -> None:
        ports.add(wire.peer)
        await wire.start()
        await wire.send(token() + DONE)
        await wire.end()

    async with scripted(script) as server, open_endpoint(EndpointOptions(server.url), RealClock()) as endpoint:
        for _ in range(3):
            assert (await endpoint.send(REQUEST, endpoint.body(REQUEST), 0.0)).failure is None
    assert len(ports) == 1


async def test_proxies_of_the_environment_are_passed_by(monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with scripted() as server:
        assert (await send(server.url)).failure is None


async def test_our_own_gateway_is_measured():
    smollm2 = locate("smollm2").tokenizer()
    tokenizer = Tokenizer(smollm2)
    backend = FakeBackend(lambda text: list(smollm2.encode(text, add_special_tokens=False)), tokenizer.decode)
    model = ServedModel("smollm2", 400, tokenizer.vocab_size, created_s=0)
    services = Services(backend, tokenizer, (model,), GatewayConfig(), GatewayMetrics(CollectorRegistry(), []))

    async def targets() -> list[object]:
        return []

    app = create_app(services, metrics_text=lambda: b"", metrics_targets=targets)
    with serving(app) as url:
        record = await send(url, model=None, extra_body={"depth": "full"})
    tokenizer.close()
    assert (record.failure, record.detail) == (None, "")
    assert (record.prompt_tokens, record.output_tokens, len(record.itl_s)) == (7, 3, 2)
    assert record.tokens_from is TokenSource.USAGE
    assert backend.requests[0].prompt_token_ids == REQUEST.prompt and backend.requests[0].depth == "full"


# --- failures -------------------------------------------------------------------------------------------


def says(document: object, status: int) -> Script:
    return lambda request, wire: wire.answer(document, status)


@pytest.mark.parametrize(
    ("status", "failure"),
    [(429, Failure.REJECTED), (503, Failure.REJECTED), (400, Failure.HTTP_ERROR), (307, Failure.HTTP_ERROR)],
)
async def test_another_status_is_a_failure_in_the_endpoints_words(status: int, failure: Failure):
    record = await failure_of(says({"error": {"message": "too busy", "code": "overloaded"}}, status))
    assert (record.failure, record.status, record.detail) == (failure, status, "too busy")


async def test_an_error_without_end_is_not_read_to_its_end():
    async def script(request: Request, wire: Wire) -> None:
        await wire.start(500, "text/plain")
        await wire.send(b"x" * 100_000)
        await wire.gone()

    assert (await failure_of(script, timeout_s=20)).failure is Failure.HTTP_ERROR


def after_a_token(*data: bytes, breaks: bool = False) -> Script:
    async def script(request: Request, wire: Wire) -> None:
        await wire.start()
        await wire.send(token())
        for one in data:
            await wire.send(one)
        if breaks:
            wire.break_off()
        else:
            await wire.end()

    return script


@pytest.mark.parametrize(
    ("script", "failure", "detail"),
    [
        (after_a_token(event({"error": {"message": "no blocks"}})), Failure.ERROR_EVENT, "no blocks"),
        (after_a_token(b"data: {oops\n\n", DONE), Failure.MALFORMED, "no JSON object"),
        (after_a_token(), Failure.BROKEN_STREAM, "without [DONE]"),
        (after_a_token(breaks=True), Failure.BROKEN_STREAM, "the connection was lost"),
    ],
)
async def test_a_stream_that_fails_keeps_what_came_before(script: Script, failure: Failure, detail: str):
    record = await failure_of(script)
    assert record.failure is failure and detail in record.detail
    assert record.ttft_s is not None and record.output_tokens == 1 and record.status == 200


async def test_a_stream_without_tokens_is_no_answer():
    async def script(request: Request, wire: Wire) -> None:
        await wire.start()
        await wire.send(token("", "stop") + usage({"prompt_tokens": 7, "completion_tokens": 0}) + DONE)
        await wire.end()

    assert (await failure_of(script)).failure is Failure.NO_TOKENS


async def test_a_body_that_is_no_stream_is_malformed():
    record = await failure_of(says({"choices": [{"text": "all at once"}]}, 200))
    assert record.failure is Failure.MALFORMED and "application/json" in record.detail


async def test_a_connection_that_is_closed_without_an_answer_is_told_apart():
    async def script(request: Request, wire: Wire) -> None:
        wire.break_off()

    assert (await failure_of(script)).failure is Failure.DISCONNECTED


async def test_a_port_where_nobody_listens_is_unreachable(free_port: int):
    record = await send(f"http://127.0.0.1:{free_port}")
    assert record.failure is Failure.UNREACHABLE and record.status is None
    assert record.detail == "no connection: Connection refused"


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (
            OSError("Multiple exceptions: [Errno 101] Connect call failed ('::1', 9), [Errno 111] Connect call failed"),
            "Network is unreachable, Connection refused",
        ),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "[Errno -2] Name or service not known"),
        (ssl.SSLError(1, "[SSL] record layer failure"), "[SSL] record layer failure"),
    ],
)
async def test_why_an_endpoint_is_unreachable_is_told(cause: OSError, said: str, monkeypatch: pytest.MonkeyPatch):
    """As aiohttp is told, whose connections try each address that a name has."""

    async def connect(*_arguments: Any, **_options: Any) -> Any:
        raise cause

    monkeypatch.setattr("aiohappyeyeballs.start_connection", connect)
    record = await send("http://127.0.0.1:9", api_key="secret")
    assert record.failure is Failure.UNREACHABLE
    assert record.detail == f"no connection: {said}" and "secret" not in record.detail


async def test_an_error_that_no_file_could_hold_is_told_as_far_as_it_can_be():
    record = await failure_of(says({"error": {"message": "half \ud800"}}, 500))
    assert ascii(record.detail) == ascii("half ?")


@pytest.mark.parametrize("sends_first", [False, True])
async def test_a_request_that_is_not_done_in_time_is_given_up(sends_first: bool):
    gone = asyncio.Event()

    async def script(request: Request, wire: Wire) -> None:
        if sends_first:
            await wire.start()
            await wire.send(token())
        await wire.gone()
        gone.set()

    async with scripted(script) as server:
        record = await send(server.url, timeout_s=0.3)
        await gone.wait()
    assert record.failure is Failure.TIMEOUT and "0.3 s" in record.detail


# --- which endpoint, which model ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/"),
        ("https://example.com/openai/v1/", "https://example.com/openai/v1/"),
    ],
)
def test_v1_is_added_where_it_is_missing(typed: str, base: str):
    assert base_url(typed) == base


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x/v1?a=1", "http://x:port"])
def test_what_is_no_endpoint_is_refused(url: str):
    with pytest.raises(ConfigError, match="write one like http://127"):
        base_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://alice:secret@127.0.0.1:8000",
        "alice:secret@127.0.0.1:8000",
        "http://alice:sec/secret@127.0.0.1",
    ],
)
async def test_a_password_in_the_url_is_refused_and_not_told(url: str):
    with pytest.raises(ConfigError, match="leave them out") as raised:
        async with open_endpoint(EndpointOptions(url, "m"), RealClock()):
            pass
    assert not any(word in str(raised.value) for word in ("alice", "sec/", "secret"))


@pytest.mark.parametrize("timeout_s", [float("inf"), 0.0])
def test_a_timeout_ends(timeout_s: float):
    with pytest.raises(ConfigError, match="--timeout-s must be more than 0, and finite"):
        EndpointOptions("http://127.0.0.1:1", timeout_s=timeout_s)


async def test_the_first_model_is_asked_unless_one_is_named():
    async with scripted(models=("first", "second")) as server:
        async with open_endpoint(EndpointOptions(server.url), RealClock()) as endpoint:
            assert endpoint.model == "first" and json.loads(endpoint.body(REQUEST))["model"] == "first"
        async with open_endpoint(EndpointOptions(server.url, "third"), RealClock()) as endpoint:
            assert endpoint.model == "third"
        assert [request.path for request in server.requests] == ["/v1/models"]


async def test_where_a_certificate_isn_t_trusted_what_names_its_ca_is_told():
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(server_side)
    server = await asyncio.start_server(ScriptedEndpoint(whole_answer).serve, "127.0.0.1", 0, ssl=server_side)
    async with server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(Unavailable, match="in SSL_CERT_FILE"):
            async with open_endpoint(EndpointOptions(url), RealClock()):
                pass
        record = await send(url)
        assert record.failure is Failure.UNREACHABLE and "CERTIFICATE_VERIFY_FAILED" in record.detail
