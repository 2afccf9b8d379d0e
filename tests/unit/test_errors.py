from __future__ import annotations

import inspect
import pickle
import re

import pytest

from shoal import errors
from shoal.errors import ShoalError

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ShoalError)]


def drawn() -> tuple[dict[str, str | None], dict[str, int]]:
    """Parents and HTTP statuses by class name, as errors.py's docstring draws them."""
    parents: dict[str, str | None] = {}
    statuses: dict[str, int] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([│├└─ ]*)([A-Z]\w+)(?: +(\d{3})\b)?", line)
        if match is None:
            continue
        branch, name, status = match.groups()
        path = path[: len(branch) // 4]
        parents[name] = path[-1] if path else None
        path.append(name)
        if status is not None:
            statuses[name] = int(status)
    return parents, statuses


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    parents, _ = drawn()
    real = {kind.__name__: kind.__base__.__name__ if kind is not ShoalError else None for kind in TREE}
    assert parents == real


def test_the_statuses_in_the_docstring_are_the_statuses() -> None:
    _, statuses = drawn()
    assert statuses
    assert statuses == {kind.__name__: kind.http_status for kind in TREE if kind.__name__ in statuses}


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling_with_all_its_fields(kind: type[ShoalError], protocol: int) -> None:
    back = pickle.loads(pickle.dumps(kind("what happened", param="prompt", retry_after_s=1.5), protocol))
    assert type(back) is kind
    assert (back.message, back.param, back.retry_after_s) == ("what happened", "prompt", 1.5)
    assert str(back) == "what happened"


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_an_error_has_what_the_api_answers(kind: type[ShoalError]) -> None:
    assert 400 <= kind.http_status <= 599
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", kind.code)
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", kind.type)


def test_only_a_clients_fault_is_an_invalid_request_error() -> None:
    about_the_key = {errors.Unauthenticated, errors.PermissionDenied}
    at_fault = {kind for kind in TREE if issubclass(kind, errors.RequestError)} - about_the_key
    assert {kind for kind in TREE if kind.type == "invalid_request_error"} == at_fault
