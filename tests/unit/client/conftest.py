from __future__ import annotations

from collections.abc import Iterator

import pytest
from callers import AsyncCaller, Caller
from fake_inference import FakeInference, serving


@pytest.fixture
def service() -> FakeInference:
    return FakeInference()


@pytest.fixture
def target(service: FakeInference) -> Iterator[str]:
    with serving(service) as address:
        yield address


@pytest.fixture(params=[Caller, AsyncCaller], ids=["Client", "AsyncClient"])
def kind(request: pytest.FixtureRequest) -> type[Caller]:
    chosen: type[Caller] = request.param
    return chosen


@pytest.fixture
def caller(kind: type[Caller], target: str) -> Caller:
    """Either client, with two attempts: enough to see whether there's a second one."""
    return kind(target, timeout_s=20, max_attempts=2)
