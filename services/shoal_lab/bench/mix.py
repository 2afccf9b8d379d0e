"""What requests are made of: classes of prompt and output lengths, each with its share and its SLOs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from shoal.errors import ConfigError

_FORM = "write prompt:output[:share[:ttft_ms:tpot_ms]], with commas between classes, like 1500-2000:64:0.3,100:64:0.7"


@dataclass(frozen=True, slots=True)
class Slo:
    """The service level objectives of one request, in milliseconds. Times equal to them still meet them."""

    ttft_ms: float
    tpot_ms: float

    def __post_init__(self) -> None:
        if not (0 < self.ttft_ms < math.inf and 0 < self.tpot_ms < math.inf):
            raise ConfigError(f"SLOs of {self.ttft_ms:g} and {self.tpot_ms:g} ms: both must be more than 0, and finite")


@dataclass(frozen=True, slots=True)
class RequestClass:
    """Requests whose lengths are drawn evenly from ``[low, high]`` tokens. Shares of a mix are relative weights."""

    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    share: float
    slo: Slo

    @property
    def name(self) -> str:
        """As it was written: ``1500-2000:64``."""
        return f"{_written(self.prompt_tokens)}:{_written(self.output_tokens)}"


def parse_mix(text: str, slo: Slo) -> tuple[RequestClass, ...]:
    """``prompt:output[:share[:ttft_ms:tpot_ms]]``, comma-separated; ``slo`` is for classes that name none of their own.

    Raises ConfigError.
    """
    mix = tuple(_parse_class(part.strip(), slo) for part in text.split(","))
    names = [one.name for one in mix]
    if len(set(names)) < len(names):
        raise ConfigError(f"--mix has one class twice: add their shares, and name it once ({text})")
    return mix


def _parse_class(text: str, slo: Slo) -> RequestClass:
    fields = text.split(":")
    if len(fields) not in {2, 3, 5}:
        raise ConfigError(f"--mix has {text!r}: {_FORM}")
    share = _number(fields[2], text) if len(fields) > 2 else 1.0
    if share <= 0:
        raise ConfigError(f"--mix has {text!r}: a share must be more than 0, so leave out the class")
    own = Slo(_number(fields[3], text), _number(fields[4], text)) if len(fields) == 5 else slo
    return RequestClass(_parse_range(fields[0], text), _parse_range(fields[1], text), share, own)


def _parse_range(field: str, text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", field.strip())
    if not found:
        raise ConfigError(f"--mix has {text!r}: {_FORM}")
    low = int(found[1])
    high = int(found[2] or low)
    if not 1 <= low <= high:
        raise ConfigError(f"--mix has {text!r}: lengths begin with 1 token, and ranges with their smaller end")
    return low, high


def _number(field: str, text: str) -> float:
    try:
        number = float(field)
    except ValueError:
        raise ConfigError(f"--mix has {text!r}: {_FORM}") from None
    if not 0 <= number < float("inf"):
        raise ConfigError(f"--mix has {text!r}: {field} is no share and no time")
    return number


def _written(bounds: tuple[int, int]) -> str:
    low, high = bounds
    return str(low) if low == high else f"{low}-{high}"
