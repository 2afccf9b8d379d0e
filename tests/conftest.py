"""For all tests: what must be set before torch loads."""

from __future__ import annotations

import os

# Several processes of a test run share the cores: threads that spin while they wait would starve the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Mapping  # noqa: E402 - after the environment

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def known() -> Mapping[str, object]:
    """The twenty real prompts by name, with what the references say to them (``real_prompts.RealPrompt``)."""
    from real_prompts import real_prompts

    found = {prompt.name: prompt for prompt in real_prompts()}
    lengths = sorted(len(prompt.token_ids) for prompt in found.values())
    assert len(lengths) == 20 and lengths[0] >= 20 and lengths[-1] <= 1500 and lengths[-4] > 1000
    return found
