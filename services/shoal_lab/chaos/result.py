"""What came of a scenario, and of all of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from shoal_lab.chaos.load import End, Outcome

_MAX_MESSAGES = 8


@dataclass(frozen=True, slots=True)
class Result:
    """Of one scenario. ``num_in_flight`` is what was under way when the fault began.

    ``messages`` are errors', each once; ``repairs`` how often decode refused what came, or it or the gateway took
    another way; ``recovered_s`` is ``None`` if it didn't recover; ``left`` is what stayed held.
    """

    scenario: str
    says: str
    num_in_flight: int
    num_by_end: Mapping[str, int]
    num_by_code: Mapping[str, int]
    messages: Sequence[str]
    repairs: Mapping[str, int]
    recovered_s: float | None
    left: Mapping[str, float]
    duration_s: float

    @classmethod
    def of(cls, scenario: str, says: str, outcomes: Sequence[Outcome], **others: Any) -> Self:
        ends = Counter(str(outcome.end) for outcome in outcomes)
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        codes = Counter(error.code for error in errors)
        messages = sorted({error.message for error in errors})
        return cls(
            scenario, says, num_by_end=dict(ends), num_by_code=dict(codes), messages=messages[:_MAX_MESSAGES], **others
        )

    @property
    def num_requests(self) -> int:
        return sum(self.num_by_end.values())

    def num(self, end: End) -> int:
        return self.num_by_end.get(end, 0)

    @property
    def num_felt(self) -> int:
        """All repairs: with none, the fault hit nobody's request."""
        return sum(self.repairs.values())

    @property
    def is_clean(self) -> bool:
        """Nothing was wrong, hung, or stayed held, and all came back."""
        return not (self.num(End.WRONG) or self.num(End.HUNG) or self.left) and self.recovered_s is not None


@dataclass(frozen=True, slots=True)
class Report:
    """All results, in the order in which they came; a scenario may come again."""

    model: str
    results: tuple[Result, ...]

    @property
    def is_clean(self) -> bool:
        """And something was shown."""
        return bool(self.results) and all(result.is_clean for result in self.results)

    @property
    def num_requests(self) -> int:
        return sum(result.num_requests for result in self.results)

    @property
    def num_felt(self) -> int:
        return sum(result.num_felt for result in self.results)

    def num(self, end: End) -> int:
        return sum(result.num(end) for result in self.results)

    @property
    def correct_ratio(self) -> float:
        """Of the requests whose connection held."""
        return self.num(End.CORRECT) / max(1, self.num_requests - self.num(End.CUT_OFF))

    def to_json(self) -> str:
        tree = {
            "model": self.model,
            "num_requests": self.num_requests,
            "num_by_end": {str(end): self.num(end) for end in End},
            "correct_ratio": self.correct_ratio,
            "is_clean": self.is_clean,
            "results": [asdict(result) for result in self.results],
        }
        return json.dumps(tree, indent=1) + "\n"
