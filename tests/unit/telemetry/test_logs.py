"""Logs carry the request's id, and never what the client wrote."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from shoal.telemetry import bind_request, configure_logging
from shoal.telemetry.logs import FIELDS

SECRET = "my grandmother's recipe"


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def written(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_both_loggers_write_json_with_the_request_id() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    with bind_request("req-1"):
        structlog.get_logger("shoal.gateway").info("request finished", status=200)
        logging.getLogger("shoal.engine").warning("slow step")
    logging.getLogger("shoal.engine").warning("after it")
    first, second, third = written(stream)
    assert first["event"] == "request finished"
    assert (first["request_id"], first["status"], first["level"]) == ("req-1", 200, "info")
    assert (second["request_id"], second["logger"]) == ("req-1", "shoal.engine")
    assert "request_id" not in third


async def test_concurrent_requests_keep_their_own_id() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    both_bound = asyncio.Barrier(2)

    async def serve(request_id: str) -> None:
        with bind_request(request_id):
            await both_bound.wait()
            structlog.get_logger().info("served", tenant=request_id)

    await asyncio.gather(serve("a"), serve("b"))
    assert {(line["request_id"], line["tenant"]) for line in written(stream)} == {("a", "a"), ("b", "b")}


@pytest.mark.parametrize("line_format", ["json", "console"])
@pytest.mark.parametrize("field", ["prompt", "text", "messages", "token_ids", "request", "output"])
def test_what_a_client_wrote_is_withheld(line_format: str, field: str) -> None:
    stream = io.StringIO()
    configure_logging("debug", line_format, stream)  # type: ignore[arg-type]
    structlog.get_logger().info("received", **{field: SECRET}, num_prompt_tokens=7)
    assert SECRET not in stream.getvalue()
    assert "(withheld)" in stream.getvalue()
    assert "num_prompt_tokens" in stream.getvalue()


@pytest.mark.parametrize("line_format", ["json", "console"])
def test_a_traceback_does_not_print_local_variables(line_format: str) -> None:
    stream = io.StringIO()
    configure_logging("info", line_format, stream)  # type: ignore[arg-type]

    def fail(prompt: str) -> None:
        raise RuntimeError(f"a defect after {len(prompt)} characters")

    try:
        fail(SECRET)
    except RuntimeError:
        structlog.get_logger().exception("failed")
        logging.getLogger("shoal").exception("failed")
    assert stream.getvalue().count("a defect after 23 characters") == 2
    assert "Traceback" in stream.getvalue()
    assert SECRET not in stream.getvalue()


def test_no_field_that_can_be_logged_holds_text() -> None:
    assert not FIELDS & {"prompt", "text", "messages", "content", "token_ids", "prompt_token_ids", "output", "stop"}


def test_the_level_holds_and_libraries_are_quiet() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    logging.getLogger("shoal").debug("too much")
    logging.getLogger("httpx").info("GET /")
    logging.getLogger("uvicorn.access").info("GET /")
    logging.getLogger("httpx").warning("it matters")
    assert [line["event"] for line in written(stream)] == ["it matters"]


def test_calling_it_again_writes_each_line_once() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging("info", "json", first)
    configure_logging("warning", "json", second)
    logging.getLogger("shoal").warning("once")
    assert first.getvalue() == ""
    assert len(written(second)) == 1
