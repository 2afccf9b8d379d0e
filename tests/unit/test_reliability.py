"""What docs/reliability.md says is tested has the tests that it names."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
LINK = re.compile(r"\[([Tt]est\w+)\]\(([^)]+\.py)\)")


def rows() -> list[tuple[str, str]]:
    """Each row of the tables that name tests: what it is about, and its last cell."""
    found = []
    for table in re.findall(r"^\|[^\n]*\| shown by \|\n\|[-|]+\|\n((?:\|[^\n]+\n)+)", PAGE.read_text(), re.MULTILINE):
        cells = [line.strip("|").split(" | ") for line in table.splitlines()]
        found += [(" ".join(row[:-1]).strip(), row[-1].strip()) for row in cells]
    return found


@cache
def collected_in(path: Path) -> frozenset[str]:
    """Functions and state machines that pytest collects there, by name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Attribute(attr="TestCase")):
                names.add(name)
    return frozenset(name for name in names if name.lower().startswith("test"))


def test_the_page_has_its_tables() -> None:
    tables = {"client goes away", "Decode publishes only"}
    told = "\n".join(about for about, _ in rows()).lower()
    assert all(words.lower() in told for words in tables)
    assert len(rows()) > 20


@pytest.mark.parametrize(("about", "shown"), rows(), ids=lambda cell: cell[:40])
def test_each_row_names_tests_that_exist(about: str, shown: str) -> None:
    named = LINK.findall(shown)
    assert named, f"no test is named for: {about}"
    assert LINK.sub("", shown).replace(",", "").strip() == ""
    for name, target in named:
        assert name in collected_in((PAGE.parent / target).resolve()), f"{target} has no {name}"


def test_a_test_that_is_gone_would_be_noticed() -> None:
    mine = collected_in(Path(__file__))
    assert "test_a_test_that_is_gone_would_be_noticed" in mine and "test_that_was_never_there" not in mine
