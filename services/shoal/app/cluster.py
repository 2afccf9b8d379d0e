"""Starts Ray (or joins it), deploys the pools, and leaves nothing behind.

::

    ports free? ─> Ray ─> resources there? ─> Serve ─> deploy, load weights ─> serve ─> drain ─> Ray down, files gone
                   └────────── signals are noted only ──────────┘                        └─ noted only ─┘

A private cluster's processes end with this one, however it ends; a cluster that was joined only loses our application.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.app.interrupts import Interrupts, caught
from shoal.app.ports import free_port, require_free, url_of
from shoal.app.progress import OnProgress, Progress
from shoal.app.ray_thread import RayThread
from shoal.config import ShoalConfig
from shoal.errors import ConfigError, Unavailable

# Read by Ray when it's imported, so they are set before. What the user has set wins.
_PRIVATE_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Log lines of replicas arrive as they were written: JSON stays JSON.
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    "RAY_DEDUP_LOGS": "0",
    # Some of Ray's ports listen on all interfaces. A token of our own keeps others out, and the home folder clean.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
STATUS_PERIOD_S = 0.2
