"""What goes wrong is one of our errors, and is tried again only where that helps."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from callers import Caller
from fake_inference import TEXT, WORDS, Failure, FakeInference, serving

from shoal import errors
from shoal.client import Client, Delta

WAYS: list[Callable[..., Any]] = [
    lambda caller, **options: caller.generate(**options),
    lambda caller, **options: caller.stream(**options),
]


@pytest.fixture(params=WAYS, ids=["generate", "stream"])
def ask(request: pytest.FixtureRequest) -> Callable[..., Any]:
    chosen: Callable[..., Any] = request.param
    return chosen


@pytest.fixture
def nobody(free_port: int) -> str:
    """An address at which nothing listens."""
    return f"127.0.0.1:{free_port}"


# --- typed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("n must be at least 1", param="n"),
        errors.ContextLengthExceeded("too long", param="max_tokens"),
        errors.ModelNotFound("no such model", param="model"),
        errors.RequestTooLarge("too large"),
        errors.DeadlineExceeded("the server's own deadline"),
        errors.InternalError("hidden"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_servers_error_is_raised_and_isnt_tried_again(
    error: errors.ShoalError, ask: Callable[..., Any], caller: Caller, service: FakeInference
) -> None:
    service.failures = [error]
    with pytest.raises(errors.ShoalError) as caught:
        ask(caller, request_id="mine-1")
    assert type(caught.value) is type(error)
    assert caught.value.param == error.param
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert caught.value.__notes__ == ["request id: mine-1"]
    assert service.num_attempts == 1


def test_an_overloaded_server_says_when_to_come_back(
    ask: Callable[..., Any], caller: Caller, service: FakeInference
) -> None:
    service.failures = [errors.Overloaded("the queue is full", retry_after_s=1.5)] * 2
    with pytest.raises(errors.Overloaded, match="the queue is full") as caught:
        ask(caller)
    assert caught.value.retry_after_s == 1.5


def test_a_deadline_passes(ask: Callable[..., Any], caller: Caller, service: FakeInference) -> None:
    service.holds = True
    with pytest.raises(errors.DeadlineExceeded, match=r"within 0.3 s: raise timeout_s"):
        ask(caller, timeout_s=0.3)


def test_an_absent_server_fails_clearly(kind: type[Caller], ask: Callable[..., Any], nobody: str) -> None:
    with pytest.raises(errors.PeerGone, match=f"^{nobody} can't be reached, .*refused.*: check that it runs"):
        ask(kind(nobody, timeout_s=20, max_attempts=2))


def test_a_server_that_comes_back_is_found(nobody: str, service: FakeInference) -> None:
    with Client(nobody, timeout_s=20) as client:
        with pytest.raises(errors.PeerGone):
            client.generate("The sea is")
        with serving(service, port=int(nobody.partition(":")[2])):
            assert client.generate("The sea is").text == TEXT


def test_a_server_that_says_nothing_isnt_ready(kind: type[Caller]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system accepts for it
        assert not kind(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3).is_ready()


def test_a_request_above_the_servers_limit_is_too_large(caller: Caller) -> None:
    with pytest.raises(errors.RequestTooLarge):
        caller.generate("x" * (17 << 20))


# --- tried again ----------------------------------------------------------------------------------------

PASSING: list[Failure] = [
    errors.Unavailable("no decode replica"),
    errors.Overloaded("the queue is full"),
    grpc.StatusCode.UNAVAILABLE,
]


@pytest.mark.parametrize("failure", PASSING, ids=str)
def test_what_passes_is_tried_again(
    failure: Failure, ask: Callable[..., Any], caller: Caller, service: FakeInference
) -> None:
    service.failures = [failure]
    ask(caller)
    assert service.num_attempts == 2
    assert service.requests[0] == service.requests[1]
    assert service.metadata[0]["x-request-id"] == service.metadata[1]["x-request-id"]


@pytest.mark.parametrize("max_attempts", [1, 2, 3])
def test_attempts_are_bounded(
    max_attempts: int, kind: type[Caller], ask: Callable[..., Any], target: str, service: FakeInference
) -> None:
    service.failures = [errors.Unavailable("no decode replica")] * 10
    with pytest.raises(errors.Unavailable):
        ask(kind(target, timeout_s=20, max_attempts=max_attempts))
    assert service.num_attempts == max_attempts


def test_nothing_is_tried_again_after_the_first_word(caller: Caller, service: FakeInference) -> None:
    service.num_words, service.last_failure = 1, errors.Unavailable("decode went away")
    deltas: list[Delta] = []
    with pytest.raises(errors.Unavailable, match="decode went away"):
        caller.stream(into=deltas)
    assert [delta.text for delta in deltas] == [WORDS[0]]
    assert service.num_attempts == 1


def test_a_long_prompt_is_tried_again_too(caller: Caller, service: FakeInference) -> None:
    service.failures = [errors.Unavailable("no decode replica")]
    assert caller.generate("x" * (2 << 20)).text == TEXT
    assert service.num_attempts == 2
