"""Retrieval cases hold what they claim to hold: five facts, one asked for, at its depth, in a prompt of its length."""

from __future__ import annotations

import itertools
import re

import pytest
from models import tiny_tokenizer

from shoal.errors import TooLittleText
from shoal.model.files import locate
from shoal_lab.quality.retrieval import DEPTHS, LENGTHS, RetrievalCase, retrieval_cases
from shoal_lab.quality.texts import Kind, Split, load

TINY = tiny_tokenizer()  # one token a character
FILLER = " ".join(f"Now {word} waits between us." for word in map(chr, range(97, 123))) * 40


def tiny_cases(**options) -> list[RetrievalCase]:
    options = {"lengths": (600, 1200), "num_cases_per_cell": 3, **options}
    return retrieval_cases(TINY, FILLER, **options)


def text(ids: tuple[int, ...]) -> str:
    return TINY.decode(list(ids))


def facts(case: RetrievalCase) -> dict[str, str]:
    return dict(re.findall(r"The code of (\w+) is (\d+)\.", text(case.prompt)))


def test_by_default_there_are_500_cases_as_many_in_every_cell():
    tokenizer = locate("smollm2").tokenizer()
    cases = retrieval_cases(tokenizer, load(Kind.PROSE, Split.EVALUATION).documents[0])
    cells = {cell: len(list(group)) for cell, group in itertools.groupby(cases, lambda case: (case.length, case.depth))}
    assert cells == dict.fromkeys(itertools.product(LENGTHS, DEPTHS), 25)
    assert all(0.75 * case.length <= len(case.prompt) <= case.length for case in cases)
    assert len({case.prompt for case in cases}) == 500


def test_the_answer_is_the_asked_fact_s_code_and_no_other_s():
    for case in tiny_cases():
        [asked] = re.findall(r"What is the code of (\w+)\?", text(case.prompt))
        found = facts(case)
        assert len(found) == len(set(found.values())) == 5
        assert text(case.answer) == f" {found[asked]}"
        assert text(case.prompt).endswith(f"The code of {asked} is")


def test_the_asked_fact_stands_at_its_depth():
    for case in tiny_cases():
        [asked] = re.findall(r"What is the code of (\w+)\?", text(case.prompt))
        assert list(facts(case)).index(asked) == case.depth * 4
        position = text(case.prompt).index(f"The code of {asked} is") / text(case.prompt).index("What is the code")
        assert abs(position - case.depth) < 0.15


def test_a_model_with_a_chat_template_is_asked_in_it_and_another_in_plain_text():
    plain = tiny_tokenizer()
    plain.chat_template = None
    [case] = retrieval_cases(plain, FILLER, lengths=(600,), depths=(0.5,), num_cases_per_cell=1)
    assert re.search(r"Question: What is the code of \w+\?.?Answer: The code of \w+ is$", text(case.prompt))
    [chat] = retrieval_cases(TINY, FILLER, lengths=(600,), depths=(0.5,), num_cases_per_cell=1)
    begun = text(chat.prompt).index("What is the code")
    assert "Question" not in text(chat.prompt)
    assert text(chat.prompt)[begun:].startswith(text(case.prompt)[text(case.prompt).index("What is the code") :][:20])


def test_prompts_too_short_for_the_facts_are_refused():
    with pytest.raises(TooLittleText, match="5 facts don't fit into 100 tokens"):
        tiny_cases(lengths=(100,))
