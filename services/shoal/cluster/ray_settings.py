"""How Ray and Serve are set up: their environment, the private cluster's size, and what they may say."""

from __future__ import annotations

import math
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cluster.graph import Replicas, bind, demand, is_private
from shoal.config import ShoalConfig

if TYPE_CHECKING:
    from ray.serve import RunTarget
    from ray.serve.schema import LoggingConfig

# Ray reads some of these when it's imported, so it's imported after they are set. What the user has set wins.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A replica whose engine hangs can't finish its answers: it would be waited for all the same, for a minute and more,
    # and would hold what its successor needs.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # Replicas log a line a request, and Ray by itself keeps all of it: here, three files of 32 MiB of each log.
    "RAY_ROTATION_MAX_BYTES": str(32 << 20),
    "RAY_ROTATION_BACKUP_COUNT": "2",
    # A call that comes late, after Ray is down, would start another Ray.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Log lines of replicas arrive as they were written: JSON stays JSON.
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    "RAY_DEDUP_LOGS": "0",
}
_PRIVATE_ENVIRONMENT = {
    # Ray replaces 127.0.0.1 by the address of another interface unless it thinks that this is such a system.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # On a small machine a busy replica may take longer than 0.1 s to say how busy it is.
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
    # Ray makes its workers 15 nicer than all else on the machine: of a core that both want they'd have a thirtieth.
    "RAY_worker_niceness": "0",
    # Beside models on the same cores Ray's housekeeping is felt: Serve's controller wakes ten times a second and asks
    # Ray for all that's known, folders are searched for new events and as often for new logs, and every process counts
    # and exports what nobody reads, since there is no dashboard.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    "RAY_enable_metrics_collection": "0",
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "60",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # from this many files on it looks twice a second
    "EVENT_AGENT_REPORT_INTERVAL_SECONDS": "5",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "METRICS_RECORD_INTERVAL_S": "60",
    # Some of Ray's ports listen on all interfaces, guarded by a token. One of our own keeps the home folder clean.
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}


def set_environment(config: ShoalConfig) -> None:
    for name, value in (_ENVIRONMENT | (_PRIVATE_ENVIRONMENT if is_private(config) else {})).items():
        os.environ.setdefault(name, value)


def asks_for_token() -> bool:
    """Whether this process shows one: a cluster that asks for none is joined without. Ray sets the variable where it
    finds a token by itself, also one that nobody asked for."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def init_options(config: ShoalConfig, folder: Path | None) -> dict[str, Any]:
    """Arguments of ``ray.init``. ``folder`` is where a private cluster keeps its sockets and logs."""
    if not is_private(config):
        return {"address": config.ray.address}
    # Logical amounts: what the pools ask for is there, however small the machine is.
    resources = demand(config)
    num_cpus = resources.pop("CPU", 0.0)
    num_gpus = resources.pop("GPU", 0.0)
    return {
        "address": "local",
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(folder),
        "include_dashboard": False,
        "num_cpus": max(1, math.ceil(num_cpus)),
        # Ray looks for real ones unless it's told that there are none to look for.
        **({} if num_gpus else {"num_gpus": 0}),
        "resources": resources,
    }


def serve_logging(config: ShoalConfig) -> LoggingConfig:
    """Serve's own logs; the replicas' are Shoal's, which name every request already."""
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(log_level="DEBUG" if config.log.level == "debug" else "WARNING", enable_access_log=False)


def run_target(config: ShoalConfig, replicas: Replicas) -> RunTarget:
    """What Serve is asked to run. Asked again with another configuration, it replaces replicas a few at a time."""
    from ray import serve

    return serve.RunTarget(
        bind(config, replicas),
        name=config.ray.app_name,
        route_prefix=None,
        logging_config=serve_logging(config),
        # Whoever runs it may change a pool's size by Serve's own API, without a restart.
        external_scaler_enabled=True,
    )
