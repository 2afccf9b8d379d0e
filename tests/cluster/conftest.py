from __future__ import annotations

from collections.abc import Mapping

import pytest

from real_prompts import RealPrompt, real_prompts


@pytest.fixture(scope="session")
def known() -> Mapping[str, RealPrompt]:
    """The twenty real prompts by name, with what the references say to them."""
    found = {prompt.name: prompt for prompt in real_prompts()}
    lengths = sorted(len(prompt.token_ids) for prompt in found.values())
    assert len(lengths) == 20 and lengths[0] >= 20 and lengths[-1] <= 1500 and lengths[-4] > 1000
    return found
