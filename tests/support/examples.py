"""How many examples a test tries that looks for the one which breaks something.

By default few, and the same ones in each run; no test fails because the machine is busy. ``HYPOTHESIS_PROFILE=deeper``
(``make test-all``) tries four times as many where a test takes its settings from ``examples``. With ``thorough`` it's
other ones each time, and thirty times as many; what is found is printed as a line to put above the test. Under
``python -O`` it's a quarter of the few: there, one only sees that the checks are still made.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
IS_THOROUGH = PROFILE == "thorough"
_TIMES = {"quick": 1, "deeper": 4, "thorough": 30}[PROFILE]
settings.register_profile("quick", derandomize=True, database=None, deadline=None)
settings.register_profile("thorough", print_blob=True, database=None, deadline=None)
settings.register_profile("optimized", settings.get_profile("quick"), max_examples=25)
# For all tests: conftest.py sees to it.
settings.load_profile("thorough" if IS_THOROUGH else "quick" if __debug__ else "optimized")


def examples(number: int, **others: Any) -> settings:
    """Settings for a test that ``number`` examples tell enough about."""
    return settings(max_examples=number * _TIMES if __debug__ else max(1, number // 4), **others)
