"""Server-sent events out of the bytes of a stream, however the network cut them.

https://html.spec.whatwg.org/multipage/server-sent-events.html, without ids and reconnection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Event:
    """``name`` is ``message`` unless the stream says another one."""

    name: str
    data: str


class EventDecoder:
    """Feed it bytes as they come. Bytes that aren't UTF-8 become U+FFFD."""

    def __init__(self) -> None:
        self._rest = b""
        self._is_first = True
        self._name = ""
        self._data: list[str] = []

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that ``data`` completes."""
        self._rest += data
        position = 0
        for end in _LINE_END.finditer(self._rest):
            # A \n may follow a \r that the network left at the end: the line ends when that is known.
            if end[0] == b"\r" and end.end() == len(self._rest):
                break
            yield from self._line(self._rest[position : end.start()])
            position = end.end()
        self._rest = self._rest[position:]

    def close(self) -> Iterator[Event]:
        """What is left when the stream ends, for servers that end the last event with it."""
        if self._rest:
            yield from self._line(self._rest.rstrip(b"\r"))
        self._rest = b""
        yield from self._line(b"")

    def _line(self, line: bytes) -> Iterator[Event]:
        if self._is_first:
            line, self._is_first = line.removeprefix(_BOM), False
        if not line:
            if self._data:
                yield Event(self._name or "message", "\n".join(self._data))
            self._name, self._data = "", []
            return
        field, _, value = line.decode("utf-8", errors="replace").partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value
