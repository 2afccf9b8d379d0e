"""Logs carry the request's id, and never what the client wrote."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import structlog
from own_logging import own_logging

from shoal.telemetry import bind_request, configure_logging
from shoal.telemetry.logs import FIELDS

SECRET = "my grandmother's recipe"


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    with own_logging():
        yield


def written(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_both_loggers_write_json_with_the_request_id() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    with bind_request("req-1"):
        structlog.get_logger("shoal.api").info("request finished", status=200)
        logging.getLogger("shoal.engine").warning("slow step")
    logging.getLogger("shoal.engine").warning("after it")
    first, second, third = written(stream)
    assert first["event"] == "request finished"
    assert (first["request_id"], first["status"], first["level"]) == ("req-1", 200, "info")
    assert (second["request_id"], second["logger"]) == ("req-1", "shoal.engine")
    assert "request_id" not in third


@pytest.mark.parametrize("line_format", ["json", "console"])
@pytest.mark.parametrize("field", ["prompt", "text", "messages", "token_ids", "request", "output"])
def test_what_a_client_wrote_is_withheld(line_format: str, field: str) -> None:
    stream = io.StringIO()
    configure_logging("debug", line_format, stream)  # type: ignore[arg-type]
    structlog.get_logger().info("received", **{field: SECRET}, num_prompt_tokens=7)
    assert SECRET not in stream.getvalue()
    assert "(withheld)" in stream.getvalue()
    assert "num_prompt_tokens" in stream.getvalue()


def fail(prompt: str) -> None:
    raise RuntimeError(f"a defect after {prompt}")


def fail_later(prompt: str) -> None:
    try:
        fail(prompt)
    except RuntimeError as error:
        error.add_note(prompt)
        raise ValueError(prompt) from error


def fail_meanwhile(prompt: str) -> None:
    try:
        fail(prompt)
    except RuntimeError:
        raise ValueError(prompt)  # noqa: B904 - that is what is looked at


def fail_together(prompt: str) -> None:
    try:
        fail(prompt)
    except RuntimeError as error:
        raise ExceptionGroup(prompt, [error]) from None


def log_failure(work: Callable[[str], None], prompt: str) -> None:
    """By both loggers."""
    try:
        work(prompt)
    except Exception as error:
        structlog.get_logger().exception("failed")
        logging.getLogger("shoal").error("failed", exc_info=error)  # noqa: TRY400 - as where it was caught elsewhere


@pytest.mark.parametrize("line_format", ["json", "console"])
@pytest.mark.parametrize("work", [fail, fail_later, fail_meanwhile, fail_together], ids=lambda it: it.__name__)
def test_an_exception_is_told_by_class_and_place_and_without_its_text(
    line_format: Literal["json", "console"], work: Callable[[str], None]
) -> None:
    stream = io.StringIO()
    configure_logging("info", line_format, stream)
    log_failure(work, SECRET)
    told = stream.getvalue()
    assert SECRET not in told
    assert told.count("builtins.RuntimeError") == 2
    assert "Traceback" in told and "test_logs.py" in told and "in fail" in told
    assert work is fail or told.count("builtins.ValueError") + told.count("builtins.ExceptionGroup") == 2


class Fails:
    def __del__(self) -> None:
        fail(SECRET)


def end_a_thread() -> None:
    thread = threading.Thread(target=fail, args=(SECRET,))
    thread.start()
    thread.join()


def drop_what_fails() -> None:
    Fails()


@pytest.mark.parametrize("work", [end_a_thread, drop_what_fails], ids=lambda it: it.__name__)
def test_what_python_itself_would_print_is_logged_without_its_text(
    work: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    work()
    [line] = written(stream)
    assert "builtins.RuntimeError" in str(line["exception"]) and "in fail" in str(line["exception"])
    assert SECRET not in stream.getvalue() + capfd.readouterr().err


@pytest.mark.parametrize("line_format", ["json", "console"])
def test_its_text_is_told_where_that_is_asked_for_and_local_variables_are_not(
    line_format: Literal["json", "console"],
) -> None:
    stream = io.StringIO()
    configure_logging("info", line_format, stream, error_text=True)

    def fail_briefly(prompt: str) -> None:
        raise RuntimeError(f"a defect after {len(prompt)} characters")

    log_failure(fail_briefly, SECRET)
    assert stream.getvalue().count("a defect after 23 characters") == 2
    assert SECRET not in stream.getvalue()


async def test_what_asyncio_says_of_a_task_that_failed_is_without_its_text() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    task = asyncio.create_task(asyncio.to_thread(fail, SECRET))
    await asyncio.wait([task])
    del task
    gc.collect()
    asyncio.get_running_loop().call_soon(fail, SECRET)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    never_retrieved, callback = written(stream)
    assert never_retrieved["event"] == "Task exception was never retrieved"
    assert callback["event"] == "Exception in callback fail"
    assert "RuntimeError" in str(callback["exception"]) and "in fail" in str(never_retrieved["exception"])
    assert SECRET[:10] not in stream.getvalue()


def test_no_field_that_can_be_logged_holds_text() -> None:
    assert not FIELDS & {"prompt", "text", "messages", "content", "token_ids", "prompt_token_ids", "output", "stop"}
