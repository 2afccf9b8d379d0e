"""How fast answers come, as of late and at best."""

from __future__ import annotations

import pytest

from shoal.decode.tempo import Tempo


def test_it_is_as_fast_as_of_late_and_remembers_the_best():
    tempo = Tempo()
    tempo.began(0.2, 10)
    tempo.went_on(1.6, 16)
    assert tempo.now_s(10) == pytest.approx(0.2 + 1.0) and tempo.alone_s(10, 10) == pytest.approx(0.2 + 1.0)
    for _ in range(50):
        tempo.began(2.0, 10)
        tempo.went_on(16.0, 16)
    assert tempo.now_s(10) == pytest.approx(2.0 + 10.0, rel=0.01)
    assert tempo.further_s(10) == pytest.approx(10.0, rel=0.01)
    assert tempo.alone_s(10, 10) == pytest.approx(0.2 + 1.0, rel=0.1)
    assert tempo.alone_s(20, 10) == pytest.approx(0.4 + 1.0, rel=0.1)


def test_what_was_best_fades_if_it_never_comes_again():
    tempo = Tempo()
    tempo.went_on(0.16, 16)
    for _ in range(3000):
        tempo.went_on(1.6, 16)
    assert tempo.alone_s(0, 10) == pytest.approx(1.0)


def test_a_first_token_that_never_came_took_longer_than_that():
    tempo = Tempo()
    tempo.waited(3.0)
    assert tempo.now_s(0) == 3.0
    tempo.waited(1.0)
    assert tempo.now_s(0) == 3.0 and not tempo.knows_best
    tempo.waited(30.0)
    assert 3.0 < tempo.now_s(0) < 30.0


def test_the_usual_length_is_that_of_most_tokens_and_not_of_most_answers():
    tempo = Tempo()
    for _ in range(9):
        tempo.ended(5)
    assert tempo.usual_tokens == 5
    tempo.ended(600)
    assert tempo.usual_tokens == 600
    for _ in range(100):
        tempo.ended(7)
    assert tempo.usual_tokens == 7
