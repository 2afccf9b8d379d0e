"""How much the tests look at: what is alike once, or, with SHOAL_TEST_ALL=1, all of it."""

from __future__ import annotations

import os

TEST_ALL = os.environ.get("SHOAL_TEST_ALL") == "1"
