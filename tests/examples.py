"""How many examples a test tries that looks for the one which breaks something.

By default few, and the same ones in each run; no test fails because the machine is busy. With
``HYPOTHESIS_PROFILE=thorough`` it's other ones each time, and thirty times as many where a test takes its settings from
``examples``; what is found is printed as a line to put above the test.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

IS_THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
settings.register_profile("quick", derandomize=True, database=None, deadline=None)
settings.register_profile("thorough", print_blob=True, database=None, deadline=None)
settings.load_profile("thorough" if IS_THOROUGH else "quick")  # for all tests: conftest.py sees to it


def examples(number: int, **others: Any) -> settings:
    """Settings for a test that ``number`` examples tell enough about."""
    return settings(max_examples=number * (30 if IS_THOROUGH else 1), **others)
