"""What steps cost: read with care, fitted with its error, or worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cost_fits import fit
from simulation.costs import DecodeCost, PrefillCost, decode_step_s, prefill_step_s, read_costs
from simulation.engine import make_sequence
from simulations import COSTS

from shoal.engine.scheduler import ScheduledRows
from shoal.errors import ConfigError


def test_a_file_is_read_as_it_was_written(tmp_path: Path):
    path = tmp_path / "costs.json"
    path.write_text(COSTS.to_json())
    assert read_costs(path) == COSTS


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"decode": {"step_s": -1.0, "sequence_s": 0.0, "context_token_s": 0.0}}, "decode.step_s"),
        ({"decode": {"step_s": 1.0}}, "decode.sequence_s: Field required"),
        ({"handoff": {"latency_s": 0.0, "bytes_per_s": 0.0, "token_bytes": 1}}, "handoff.bytes_per_s"),
        ({"prefill": []}, "prefill"),
        ({"num_layers": 10}, "one must be left"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(change: dict[str, Any], says: str, tmp_path: Path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(json.loads(COSTS.to_json()) | change))
    with pytest.raises(ConfigError, match=says):
        read_costs(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_what_is_no_file_of_costs_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="refused"):
        read_costs(path)
    with pytest.raises(ConfigError, match=r"step_costs\.py"):
        read_costs(tmp_path / "none.json")


def test_an_unknown_skip_count_is_no_guess():
    with pytest.raises(ConfigError, match=r"nothing of 5 skipped layers, only of 0, 10"):
        COSTS.of_skip(5)


def rows(*pieces: tuple[int, int]) -> list[ScheduledRows]:
    prompt = make_sequence("any", 1000, 1, is_shallow=False, hold=False, sampled=True)
    return [ScheduledRows(prompt, start, end) for start, end in pieces]


def test_a_step_costs_what_its_rows_do_and_its_fixed_part_once():
    prompt = PrefillCost(skip_layers=0, step_s=2.0, token_s=0.1, token_context_s=0.01, context_token_s=0.0)
    token = DecodeCost(step_s=3.0, sequence_s=0.5, context_token_s=0.001)
    assert prefill_step_s(prompt, rows((0, 4), (8, 9))) == pytest.approx(2 + 5 * 0.1 + (10 + 9) * 0.01)
    reads = prompt.model_copy(update={"context_token_s": 0.2})
    assert prefill_step_s(reads, rows((0, 4), (8, 9))) == pytest.approx(2 + 5 * 0.1 + (10 + 9) * 0.01 + (4 + 9) * 0.2)
    free = token.model_copy(update={"free_sequences": 2})
    assert [free.seconds(num, 0) for num in (1, 2, 3, 5)] == [3.0, 3.0, 3.5, 4.5]
    single = 3 + 2 * 0.5 + (100 + 50) * 0.001
    assert decode_step_s(token, prompt, rows((99, 100), (49, 50))) == pytest.approx(single)
    chunk = 2 + 4 * 0.1 + 10 * 0.01
    assert decode_step_s(token, prompt, rows((0, 4))) == pytest.approx(chunk)
    assert decode_step_s(token, prompt, rows((99, 100), (0, 4), (49, 50))) == pytest.approx(single + chunk - 2)


GRID = [(1.0, float(tokens), float(tokens * context)) for tokens in (64, 256, 1024) for context in (100, 1000, 4000)]


def test_exact_times_bring_their_coefficients_back():
    truth = (4e-3, 2e-4, 3e-8)
    found, quality = fit(GRID, [float(np.dot(row, truth)) for row in GRID])
    assert found == pytest.approx(truth, rel=1e-6)
    assert quality.num == 9 and quality.max_error < 1e-9


def test_a_coefficient_that_would_be_negative_is_zero_and_the_error_is_told():
    times = [float(np.dot(row, (4e-3, 2e-4, 3e-8))) * (1.1 if index % 2 else 0.9) for index, row in enumerate(GRID)]
    found, quality = fit([(*row, row[0] - row[1] / 2000) for row in GRID], times)
    assert min(found) >= 0
    assert 0.02 < quality.median_error <= quality.max_error < 0.25
    falling, _ = fit([(1.0, float(size)) for size in (1, 2, 3)], [3.0, 2.0, 1.0])
    assert falling[1] == 0 and falling[0] > 0


def test_what_is_known_of_the_times_is_not_fitted_once_more():
    rows, known = [(1.0, float(size)) for size in (1, 4, 8, 16)], [9e-3, 11e-3, 12e-3, 21e-3]
    times = [base + float(np.dot(row, (5e-4, 1e-4))) for base, row in zip(known, rows, strict=True)]
    found, quality = fit(rows, times, known)
    assert found == pytest.approx((5e-4, 1e-4), rel=1e-6) and quality.max_error < 1e-9
    # Where more is known than was measured, it's an error of the whole time, and nothing is nearer than nothing.
    found, quality = fit(rows, [base * 0.9 for base in known], known)
    assert found == [0.0, 0.0] and quality.max_error == pytest.approx(1 / 9)
    # One that is off by a little doesn't weigh more than the rest.
    found, _ = fit(rows, [known[0] - 1e-6, *times[1:]], known)
    assert found[1] > 5e-5


def test_a_time_counts_as_much_as_its_weight_says():
    """The least of Σ weight (x / time - 1)²."""
    times, weights = [1.0, 2.0, 4.0], [1.0, 0.25, 3.0]
    [found], _ = fit([(1.0,)] * 3, times, weights=weights)
    of_first = sum(weight / time for weight, time in zip(weights, times, strict=True))
    assert found == pytest.approx(of_first / sum(weight / time**2 for weight, time in zip(weights, times, strict=True)))
