"""The texts that ship have the lengths that the demo and the tests count on."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable

import pytest
import texts

from shoal.model.files import locate


@pytest.fixture(scope="module")
def num_tokens() -> Callable[[str], int]:
    tokenizer = locate("smollm2").tokenizer()
    return lambda text: len(tokenizer(text)["input_ids"])


def test_the_guide_in_the_package_is_about_1500_tokens(num_tokens: Callable[[str], int]) -> None:
    guide = importlib.resources.files("shoal").joinpath("data/shallow-prefill.md").read_text(encoding="utf-8")
    assert 1450 <= num_tokens(guide) <= 1550


def test_there_are_twenty_prompts_of_20_to_1500_tokens(num_tokens: Callable[[str], int]) -> None:
    lengths = [num_tokens(text) for text in texts.prompts().values()]
    assert len(lengths) == 20
    assert min(lengths) >= 20
    assert max(lengths) <= 1500
    assert sum(length > 1000 for length in lengths) >= 4


def test_there_are_six_passages_of_500_to_650_tokens(num_tokens: Callable[[str], int]) -> None:
    lengths = [num_tokens(text) for text in texts.passages().values()]
    assert len(lengths) == 6
    assert min(lengths) >= 500
    assert max(lengths) <= 650
