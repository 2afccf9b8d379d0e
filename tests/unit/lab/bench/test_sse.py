"""Events come out of a stream as they went in, however it was cut."""

from __future__ import annotations

import pytest

from shoal_lab.bench.sse import Event, EventDecoder

STREAM = (
    "\ufeffdata: first\n\n: hello\r\n\r\ndata: {\"a\": \"é€😀\"}\n\n\n"
    "event: error\ndata:no space\r\ndata:  two\rid: 7\r\r"
    "event: lost\n\ndata\n\ndata: [DONE]\r\n\r\n"
).encode()  # fmt: skip
EVENTS = [
    Event("message", "first"),
    Event("message", '{"a": "é€😀"}'), Event("error", "no space\n two"), Event("message", ""),
    Event("message", "[DONE]"),
]  # fmt: skip


def decoded(*parts: bytes) -> list[Event]:
    decoder = EventDecoder()
    return [*(event for part in parts for event in decoder.feed(part)), *decoder.close()]


@pytest.mark.parametrize("size", [1, 3, 7, len(STREAM)])
def test_events_are_the_same_however_the_stream_was_cut(size: int):
    parts = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    assert decoded(*parts) == EVENTS


def test_an_event_comes_out_as_soon_as_it_is_whole():
    decoder = EventDecoder()
    assert list(decoder.feed(b"data: one\n")) == []
    assert list(decoder.feed(b"\ndata: two")) == [Event("message", "one")]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r", b"\r\n"])
def test_the_stream_may_end_with_its_last_event(end: bytes):
    assert decoded(b"data: [DONE]" + end) == [Event("message", "[DONE]")]


def test_bytes_that_are_no_utf8_spoil_their_own_event_only():
    assert decoded(b"data: \xff\n\ndata: x\n\n") == [Event("message", "\ufffd"), Event("message", "x")]
