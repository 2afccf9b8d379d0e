from __future__ import annotations

from collections import Counter

from shoal.wire.messages import Depth
from shoal_lab.chaos.cases import draw_cases


def test_the_same_seed_draws_the_same_and_of_every_kind_there_are_enough():
    cases = draw_cases(32, 97, 5)
    assert cases == draw_cases(32, 97, 5) != draw_cases(32, 97, 6)
    kinds = Counter((case.seed is None, case.is_streamed) for case in cases)
    assert set(kinds.values()) == {8}
    assert sum(case.depth is Depth.FULL for case in cases) == 4
    assert all(2 <= token_id < 97 for case in cases for token_id in case.prompt_token_ids)
    assert len({case.name for case in (*cases, *draw_cases(8, 97, 5, long=True))}) == 40


def test_a_client_and_the_stages_are_asked_the_same():
    for case in draw_cases(4, 97, 0):
        sampling, options = case.request("tiny", 1.0).sampling, case.options
        for name in ("max_tokens", "temperature", "top_k", "seed", "ignore_eos"):
            assert getattr(sampling, name) == options[name], name  # type: ignore[literal-required]
