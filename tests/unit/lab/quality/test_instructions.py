"""Each checker tells an answer that follows from one that doesn't, and the table asks for what it checks."""

from __future__ import annotations

import pytest

from shoal_lab.quality import instructions as checkers
from shoal_lab.quality.instructions import INSTRUCTIONS, Check, Instruction

EXAMPLES = [
    (checkers.max_words(3), "one two three", "one two three four"),
    (checkers.min_words(3), "one two three", "one two"),
    (checkers.num_sentences(2), 'It rains. He said "stay!"', "It rains at 3.5 degrees."),
    (checkers.num_paragraphs(2), "one\nstill one\n\n \ntwo", "one\ntwo"),
    (checkers.num_bullets(2), "Two:\n- a\n  * b", "- a\n- b\n- c"),
    (checkers.num_bullets(2), "• a\n• b", "a - b\n-c"),
    (checkers.numbered(2), "1. a\n2) b", "1. a\n1. b"),
    (checkers.numbered(2), "So:\n1. a\nmore of a\n2. b", "1. a\n2. b\n3. c"),
    (checkers.lower_case(), "all small, 3 of them.", "Not all small."),
    (checkers.upper_case(), "ALL BIG!", "ALL BIg!"),
    (checkers.upper_case(), "ÉTÉ", "123"),
    (checkers.without(",!"), "plain words.", "well, words"),
    (checkers.contains("river"), "To the River!", "to the rivers"),
    (checkers.contains("snow", 2), "Snow on snow", "snow, snowball"),
    (checkers.avoids("sour"), "sourdough is mild", "It is Sour."),
    (checkers.starts_with("Dear Sam"), "Dear Sam, hello", "dear Sam, hello"),
    (checkers.ends_with("The end."), "So it was. The end.", "The end. Or not?"),
    (checkers.one_of("yes", "no"), "Yes.", "yes, it is"),
    (checkers.quoted(), "“Onwards”", '"On" and on'),
    (checkers.only_json("a", "b"), '{"a": 1, "b": [2]}', '{"a": 1}'),
    (checkers.only_json("a"), '```json\n{"a": 1}\n```', 'Here it is: {"a": 1}'),
    (checkers.only_json("a"), '{"a": null}', '["a"]'),
    (checkers.only_json("a"), '{"a": {}}', '{"a": 1, "b": 2}'),
    (checkers.placeholders(2), "Dear [name], see [place]", "Dear [name], see []"),
]


@pytest.mark.parametrize(("check", "follows", "fails"), EXAMPLES, ids=lambda part: getattr(part, "name", None))
def test_a_check_passes_what_follows_and_fails_what_does_not(check: Check, follows: str, fails: str):
    assert check.passes(follows)
    assert not check.passes(fails)


def test_an_answer_s_score_is_the_share_of_checks_that_pass():
    case = Instruction("?", (checkers.max_words(2), checkers.lower_case()))
    assert case.score(" two words \n") == 1.0
    assert case.score("Two words") == 0.5
    assert case.score("Three Words Here") == 0.0


@pytest.mark.parametrize("case", INSTRUCTIONS, ids=lambda case: case.prompt[:40])
def test_saying_nothing_follows_no_instruction(case: Instruction):
    assert case.score(" \n") == 0.0


def test_there_are_at_least_forty_different_instructions():
    assert len({case.prompt for case in INSTRUCTIONS}) == len(INSTRUCTIONS) >= 40


# One answer that follows each of the cases with several demands, which so can't contradict one another.
