"""For all tests: what must be set before torch loads."""

from __future__ import annotations

import os

# Several processes of a test run share the cores: threads that spin while they wait would starve the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
