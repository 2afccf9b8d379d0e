"""What every request can rely on: its id, its timing, its end, and that a client who leaves is noticed."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fake_backend import STAGES

from shoal.api.backend import Readiness
from shoal.api.http_app import create_app
from shoal.api.intake import Services
from shoal.api.tokenizer import Tokenizer
from shoal.errors import DeadlineExceeded, HandoffError, Overloaded, PeerGone, Unavailable

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = {"model": "smollm2", "prompt": "Hello", "max_tokens": 50}
TEXT = "The pools hand the prompt over."
WAIT_S = 10


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


def documents(response: httpx.Response) -> list[Any]:
    return [json.loads(event) for event in events(response) if event != "[DONE]"]


# --- a request's id -------------------------------------------------------------------------------------


def test_the_clients_request_id_is_echoed_and_passed_on(gateway: Any) -> None:
    response = gateway.post(COMPLETIONS, PROMPT, headers={"x-request-id": "order-66"})
    assert response.headers["x-request-id"] == "order-66"
    assert response.json()["id"] == "cmpl-order-66"
    assert gateway.backend.requests[0].context.request_id == "order-66"


@pytest.mark.parametrize("asked", [None, "", "two words", "a" * 129, "line\tbreak", "<script>"])
def test_without_a_sane_id_a_new_one_is_made(gateway: Any, asked: str | None) -> None:
    ids = {
        gateway.post(COMPLETIONS, PROMPT, headers={} if asked is None else {"x-request-id": asked}).headers[
            "x-request-id"
        ]
        for _ in range(2)
    }
    assert len(ids) == 2
    assert all(len(one) == 32 for one in ids)


def test_a_trace_context_is_passed_on(gateway: Any) -> None:
    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
    gateway.post(COMPLETIONS, PROMPT, headers={"traceparent": traceparent})
    gateway.post(COMPLETIONS, PROMPT, headers={"traceparent": "00-no-trace-01"})
    assert [request.context.traceparent for request in gateway.backend.requests] == [traceparent, None]


# --- streams --------------------------------------------------------------------------------------------


def test_a_stream_is_server_sent_events_with_an_end(gateway: Any) -> None:
    response = gateway.post(COMPLETIONS, {**PROMPT, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert events(response)[-1] == "[DONE]"
    assert "usage" not in documents(response)[-1]


def test_tokens_are_sent_as_they_come(gateway: Any) -> None:
    gateway.backend.hold_after = 1
    with gateway.http.stream("POST", COMPLETIONS, json={**PROMPT, "stream": True}) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"] == "The"
        assert gateway.backend.num_outputs == 1
        gateway.backend.release()
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_an_event_is_one_line_to_every_client(gateway: Any) -> None:
    """httpx ends lines also where Unicode does, which JSON doesn't mind."""
    prompt = "a\x85b\u2028c\u2029d\u00e4"
    body = {**PROMPT, "prompt": prompt, "echo": True, "stream": True}
    with gateway.http.stream("POST", COMPLETIONS, json=body) as response:
        *chunks, done = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert done == "[DONE]"
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks).startswith(prompt)
    assert "\u00e4" in "".join(chunks), "what ends no line goes as it is"


def test_outputs_without_text_make_no_event(gateway: Any) -> None:
    stopped = gateway.post(COMPLETIONS, {**PROMPT, "stream": True, "stop": "s hand the prompt over!"})
    chunks = documents(stopped)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    assert len(chunks) < gateway.backend.num_outputs
    assert all(chunk["choices"][0]["text"] for chunk in chunks)


def test_a_failed_stream_ends_with_the_error_and_no_end_mark(gateway: Any) -> None:
    gateway.backend.fail_after, gateway.backend.error = 2, DeadlineExceeded("too slow")
    response = gateway.post(COMPLETIONS, {**PROMPT, "stream": True})
    assert response.status_code == 200
    *chunks, last = documents(response)
    assert len(chunks) == 2
    assert last == {
        "error": {"message": "too slow", "type": "timeout_error", "param": None, "code": "deadline_exceeded"}
    }
    assert "[DONE]" not in events(response)


# --- errors of the pools --------------------------------------------------------------------------------

POOL_ERRORS = [
    (Overloaded("full"), 429, "overloaded_error", "overloaded", "1"),
    (Overloaded("full", retry_after_s=7.2), 429, "overloaded_error", "overloaded", "8"),
    (Unavailable("gone", retry_after_s=900), 503, "unavailable_error", "unavailable", "119"),
    (HandoffError("lost"), 503, "unavailable_error", "handoff_failed", "1"),
    (DeadlineExceeded("late"), 504, "timeout_error", "deadline_exceeded", None),
    (ZeroDivisionError("secret detail"), 500, "internal_error", "internal_error", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind", "code", "retry_after"), POOL_ERRORS, ids=repr)
def test_an_error_before_the_first_token_is_an_http_status(
    gateway: Any, stream: bool, error: Exception, status: int, kind: str, code: str, retry_after: str | None
) -> None:
    gateway.backend.fail_after, gateway.backend.error = 0, error
    response = gateway.post(COMPLETIONS, {**PROMPT, "stream": stream})
    assert response.status_code == status
    assert (response.json()["error"]["type"], response.json()["error"]["code"]) == (kind, code)
    assert response.headers.get("retry-after") == retry_after
    assert response.headers.get("x-should-retry") == ("false" if status == 504 else None)  # openai's clients look
    assert "secret" not in response.text


def test_one_prompts_error_ends_the_others(gateway: Any) -> None:
    gateway.backend.fail_after, gateway.backend.error = 2, Overloaded("full")
    assert gateway.post(COMPLETIONS, {**PROMPT, "prompt": ["a", "b", "c"]}).status_code == 429
    assert all(gateway.backend.ended.acquire(timeout=WAIT_S) for _ in gateway.backend.requests)


def test_choices_that_end_without_a_reason_are_our_defect(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.backend, "outputs", lambda request: [])
    assert gateway.post(COMPLETIONS, PROMPT).status_code == 500


# --- clients who leave ----------------------------------------------------------------------------------


@contextmanager
def posted(url: str, path: str, body: object) -> Iterator[None]:
    """A request whose client hangs up at the end of the block without having read a byte."""
    raw = json.dumps(body).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
        yield


CHAT_PROMPT = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}]}
LEFT = [(COMPLETIONS, PROMPT, 1), (COMPLETIONS, {**PROMPT, "prompt": ["a", "b", "c"]}, 3), (CHAT, CHAT_PROMPT, 1)]


@pytest.mark.parametrize(("path", "body", "num_prompts"), LEFT)
@pytest.mark.parametrize(("stream", "num_seen"), [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_leaving_cancels_its_requests_and_is_told_with_what_was_seen(
    gateway: Any, path: str, body: dict[str, Any], num_prompts: int, stream: bool, num_seen: int
) -> None:
    gateway.backend.hold_after = num_seen
    with posted(gateway.url, path, {**body, "stream": stream}):
        assert all(gateway.backend.held.acquire(timeout=WAIT_S) for _ in range(num_prompts))
        assert gateway.backend.num_running == num_prompts
    assert all(gateway.backend.ended.acquire(timeout=WAIT_S) for _ in range(num_prompts))
    gateway.observer.wait_finished()
    assert [(status, kind) for _, _, status, kind in gateway.observer.finished] == [(499, "cancelled_error")]
    assert gateway.observer.gone == ["streaming" if num_seen else "waiting"]
    gateway.backend.hold_after = None
    assert gateway.post(path, body).status_code == 200


def test_leaving_while_sending_reaches_no_pool(gateway: Any) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"model"')
    gateway.observer.wait_finished()
    assert gateway.observer.finished == [("", "completions", 499, "cancelled_error")]
    assert gateway.backend.requests == []


def test_leaving_while_waiting_for_the_tokenizer_reaches_no_pool(gateway: Any, tokenizer: Tokenizer) -> None:
    is_free = threading.Event()
    tokenizer._thread.submit(is_free.wait, WAIT_S)
    with posted(gateway.url, COMPLETIONS, {**PROMPT, "prompt": "a " * 5_000}):
        while not tokenizer._thread._work_queue.qsize():
            pass
    gateway.observer.wait_finished()
    assert gateway.observer.finished == [("smollm2", "completions", 499, "cancelled_error")]
    is_free.set()
    assert gateway.backend.requests == []


# --- what the observer is told --------------------------------------------------------------------------


def test_a_finished_request_is_told_once_with_its_times(gateway: Any) -> None:
    gateway.post(COMPLETIONS, {**PROMPT, "n": 2})
    observer = gateway.observer
    observer.wait_finished()
    assert observer.started == 1
    assert observer.finished == [("smollm2", "completions", 200, "none")]
    [(ttft_s, gateway_s, stages)] = observer.first
    assert 0 < ttft_s < WAIT_S
    assert gateway_s + stages.total_s == pytest.approx(ttft_s)
    assert stages == STAGES
    num_tokens = gateway.backend.num_outputs // 2
    assert [num for _, num in observer.last] == [num_tokens] * 2
    assert len(observer.gaps) == 2 * (num_tokens - 1)
    assert (observer.refusals, observer.gone) == ([], [])


def test_each_prompts_first_token_is_told(gateway: Any) -> None:
    gateway.post(COMPLETIONS, {**PROMPT, "prompt": ["a", "b", "c"]})
    assert len(gateway.observer.first) == 3


REFUSED = [
    ({**PROMPT, "n": 99}, "smollm2", 400, "invalid_value"),
    ({**PROMPT, "model": "none"}, "none", 404, "model_not_found"),
    ({**PROMPT, "prompt": [1] * 400}, "smollm2", 400, "context_length_exceeded"),
    ({**PROMPT, "colour": "red"}, "", 400, "unknown_field"),
]


@pytest.mark.parametrize(("body", "named", "status", "code"), REFUSED)
def test_a_refused_request_is_told_with_its_reason(gateway: Any, body: Any, named: str, status: int, code: str) -> None:
    gateway.post(COMPLETIONS, body)
    gateway.observer.wait_finished()
    assert gateway.observer.finished == [(named, "completions", status, "invalid_request_error")]
    assert gateway.observer.refusals == [code]
    assert gateway.observer.first == []


@pytest.mark.parametrize(("fail_after", "refusals"), [(0, ["overloaded"]), (2, [])])
def test_an_overloaded_pool_refuses_only_what_it_has_not_begun(
    gateway: Any, fail_after: int, refusals: list[str]
) -> None:
    gateway.backend.fail_after, gateway.backend.error = fail_after, Overloaded("full")
    gateway.post(COMPLETIONS, {**PROMPT, "stream": True})
    gateway.observer.wait_finished()
    assert gateway.observer.finished == [("smollm2", "completions", 429, "overloaded_error")]
    assert gateway.observer.refusals == refusals


# --- timing, for those who ask --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [None, {"include_usage": True}])
@pytest.mark.parametrize("stream", [False, True])
def test_timing_comes_in_the_last_message(gateway: Any, stream: bool, options: Any) -> None:
    body = {**PROMPT, "n": 2, "stream": stream, "stream_options": options if stream else None}
    response = gateway.post(COMPLETIONS, body, headers={"x-shoal-timing": "1"})
    *before, last = documents(response) if stream else [response.json()]
    assert not any("shoal" in one for one in before)
    timing = last["shoal"]
    [prompt] = timing["prompts"]
    gateway_ms = prompt["stages_ms"].pop("gateway")
    assert prompt["stages_ms"] == pytest.approx(
        {"reserve": 1, "queue": 2, "prefill": 3, "transfer_exposed": 4, "boundary_step": 5}
    )
    assert gateway_ms + 15 == pytest.approx(prompt["ttft_ms"])
    assert prompt["handoff"]["transferred"] is True
    assert prompt["ttft_ms"] > 0
    sent = [gateway.backend.decode(choice["token_ids"]) for choice in timing["choices"]]
    assert sent == [TEXT, TEXT]


# --- the other routes -----------------------------------------------------------------------------------


def test_health_says_that_the_process_answers(gateway: Any) -> None:
    gateway.backend.readiness_now = Readiness(0, 0)
    assert gateway.http.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("now", "http_status", "status"),
    [
        (Readiness(2, 1), 200, "ready"),
        (Readiness(1, 0), 200, "degraded: no prefill"),
        (Readiness(0, 3), 503, "not ready: no decode"),
        (Readiness(0, 0), 503, "not ready: no decode"),
    ],
)
def test_readiness_needs_a_decode_replica(gateway: Any, now: Readiness, http_status: int, status: str) -> None:
    gateway.backend.readiness_now = now
    response = gateway.http.get("/readyz")
    assert response.status_code == http_status
    assert response.json() == {"status": status, "num_decode": now.num_decode, "num_prefill": now.num_prefill}
    assert ("retry-after" in response.headers) == (http_status == 503)


@pytest.mark.parametrize("path", ["/health", "/readyz"])
async def test_neither_says_yes_where_a_thread_of_the_gateway_hangs(services: Services, path: str) -> None:
    def hangs() -> None:
        raise PeerGone("this replica is being replaced: tokenizer stopped working", retry_after_s=1.0)

    app = create_app(replace(services, require_healthy=hangs))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        response = await client.get(path)
    assert response.status_code == 503 and "tokenizer" in response.json()["error"]["message"]
    assert response.headers["retry-after"] == "1"


def test_the_list_of_models_is_there_with_a_slash_too(gateway: Any) -> None:
    assert gateway.http.get("/v1/models/").json() == gateway.http.get("/v1/models").json()


async def test_who_thinks_is_up_to_the_request(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    encode = services.tokenizer.encode_chat

    async def noted(*arguments: Any, may_think: bool, **options: Any) -> Any:
        asked.append(may_think)
        return await encode(*arguments, **options)

    monkeypatch.setattr(services.tokenizer, "encode_chat", noted)
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    transport = httpx.ASGITransport(create_app(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        for effort in ({}, {"reasoning_effort": None}, {"reasoning_effort": "none"}):
            assert (await client.post("/v1/chat/completions", json=body | effort)).status_code == 200
    assert asked == [True, True, False]


def test_version_metrics_and_targets_are_served(gateway: Any) -> None:
    assert gateway.http.get("/version").json()["version"]
    metrics = gateway.http.get("/metrics")
    assert metrics.text == "shoal_requests_in_flight 0\n"
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert gateway.http.get("/metrics/targets").json()[0]["targets"] == ["127.0.0.1:22001"]


@pytest.mark.parametrize(("asked", "most_s"), [(None, 600), ("2.5", 2.5), ("30", 30), (".2e2", 20), ("1e6", 600)])
def test_decode_is_told_what_is_left_of_the_client_s_time(gateway: Any, asked: str | None, most_s: float) -> None:
    headers = {} if asked is None else {"x-shoal-timeout": asked}
    assert gateway.post(COMPLETIONS, PROMPT, headers=headers).status_code == 200
    [request] = gateway.backend.requests
    assert most_s - 2 < request.context.timeout_s < most_s
