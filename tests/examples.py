"""How many examples a test tries that looks for the one which breaks something.

By default few, and the same ones in each run. ``HYPOTHESIS_PROFILE=thorough`` tries thirty times as many, new ones
each time; what it finds is printed as a line to put above the test.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

IS_THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"


def examples(number: int, **others: Any) -> settings:
    """Settings for a test that ``number`` examples tell enough about."""
    return settings(
        max_examples=number * (30 if IS_THOROUGH else 1),
        derandomize=not IS_THOROUGH,
        print_blob=IS_THOROUGH,
        database=None,
        deadline=None,
        **others,
    )
