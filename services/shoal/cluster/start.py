"""Starts Ray (or joins it), deploys the pools, and leaves nothing behind.

::

    port free? ─> Ray ─> resources there? ─> Serve ─> deploy, load weights ─> serve ─> drain ─> Ray down, files gone
                  └───────── signals are noted ─────┘                                  └──── signals are noted ────┘

A private cluster's processes end with this one, however it ends; a cluster that was joined only loses our application.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shoal.cluster.daemons import Daemons
from shoal.cluster.failures import explain, missing_resources
from shoal.cluster.graph import NODE_PREFIX, Replicas, demand, grace_s, is_private, num_replicas, with_gateway
from shoal.cluster.interrupts import Interrupts, caught
from shoal.cluster.ports import free_port, require_free, url_of
from shoal.cluster.progress import OnProgress, Progress, waits_for_compiler
from shoal.cluster.ray_settings import asks_for_token, init_options, run_target, serve_logging, set_environment
from shoal.cluster.ray_thread import RayThread
from shoal.config import ShoalConfig
from shoal.decode import neighbours
from shoal.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponse

    from shoal.cluster.directory import Entry
    from shoal.wire.messages import Role

T = TypeVar("T")

_WATCH_PERIOD_S = 0.1
# A look is several calls to Ray, which take of the cores that replicas want to load their weights.
_LOADING_PERIOD_S = 0.25
_GIVE_UP_S = 3.0
_GONE = "NOT_STARTED"
"""Serve's word for an application that it doesn't have, or has no more."""

log = logging.getLogger(__name__)


class Cluster:
    """The pools, ready to serve, within ``running``."""

    def __init__(self, app: str, url: str, daemons: Daemons) -> None:
        self.app = app
        self.url = url
        self._daemons = daemons

    def replica_entries(self, role: Role | None = None) -> tuple[Entry, ...]:
        """The replicas that are ready now, of one role or all. Blocks for about a millisecond."""
        from shoal.cluster import directory

        return directory.living(self.app, role)

    def describe(self) -> dict[str, Any]:
        """What a live decode replica, and a live prefill replica behind it, hold: layers, bytes, plan."""
        from ray import serve

        described: dict[str, Any] = serve.get_deployment_handle("decode", self.app).describe.remote().result()
        return described

    def wait(self) -> None:
        """Serve until Ctrl-C, SIGTERM or SIGHUP (KeyboardInterrupt). Raises Unavailable if Ray itself ends."""
        never: Future[None] = Future()
        while True:
            self._daemons.require_live()
            futures.wait([never], timeout=1)


@contextmanager
def running(
    config: ShoalConfig,
    on_progress: OnProgress | None = None,
    *,
    replicas: Replicas | None = None,
    show_logs: bool = False,
) -> Iterator[Cluster]:
    """Everything that ``config`` describes, from the first process to the last.

    Enter it in the main thread: within it, Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt. On the way out open
    requests may finish within ``handoff.drain_s``; a second signal skips that. ``show_logs`` passes the replicas' logs
    on to stderr.

    Raises ConfigError before anything starts if the port is taken or the cluster lacks resources, and the replica's own
    ShoalError (or Unavailable with its traceback) if one can't start.
    """
    set_environment(config)
    cluster = _Start(config, replicas, on_progress or (lambda _progress: None), show_logs)
    with caught() as interrupts:
        try:
            cluster.start(interrupts)
            cluster.deploy()
            yield Cluster(config.ray.app_name, cluster.url, cluster.daemons)
        finally:
            try:
                cluster.drain()
            finally:
                cluster.stop(interrupts)


class _Start:
    """What has been started, and so must be ended."""

    def __init__(
        self, config: ShoalConfig, replicas: Replicas | None, on_progress: OnProgress, show_logs: bool
    ) -> None:
        import ray

        if ray.is_initialized():
            raise ConfigError("Ray runs in this process already: leave that cluster before you start another")
        self._config = config
        self._replicas = replicas
        self._on_progress = on_progress
        self._show_logs = show_logs
        self._compiles = waits_for_compiler(config)
        self._app = config.ray.app_name
        self._folder: Path | None = None
        self._is_deployed = False
        self._is_serve_ours = False
        self._is_over = threading.Event()
        self._calls: list[Future[Any]] = []
        self._gateway: DeploymentHandle[Any] | None = None
        gateway = config.gateway
        if is_private(config):
            self._config = with_gateway(config, port=gateway.port or free_port(gateway.host))
            self._require_free_ports()
        elif not gateway.port:
            raise ConfigError(
                "say which port: a cluster that is joined has no free one of its own (--port, gateway.port)"
            )
        self._home = RayThread("ray")
        self.daemons = Daemons()

    @property
    def _ray_folder(self) -> Path | None:
        """Below the folder that is ours alone: Ray opens its own to everybody."""
        return None if self._folder is None else self._folder / "r"

    @property
    def url(self) -> str:
        gateway = self._config.gateway
        return url_of(gateway.host, gateway.port, is_tls=gateway.tls is not None)

    def _require_free_ports(self) -> None:
        """On this machine, for the gateway."""
        gateway = self._config.gateway
        require_free(gateway.host, gateway.port)
        if gateway.grpc_port:
            require_free(gateway.host, gateway.grpc_port, "grpc_port")

    def start(self, interrupts: Interrupts) -> None:
        """Ray, then Serve: 5 to 10 s, in two steps that are not to be interrupted."""
        self._on_progress(Progress("ray", 0, 2))
        if is_private(self._config):
            # Short: Linux allows a socket's path, which Ray makes in it, 107 characters.
            self._folder = Path(tempfile.mkdtemp(prefix="shoal-"))
            # All that Ray starts has it in its environment, too: decode replicas find one another by it.
            os.environ[neighbours.VARIABLE] = str(self._folder / "neighbours")
        with ThreadPoolExecutor(1, thread_name_prefix="imports") as imports:
            if self._replicas is None:
                # Their modules take a second to load, and Ray's processes take that, too.
                imports.submit(Replicas.shipped)
            interrupts.wait(self._home.submit(self._start_ray))
        self._on_progress(Progress("ray", 1, 2))
        self._wait_for_nodes()
        interrupts.wait(self._home.submit(self._start_serve))
        self._on_progress(Progress("ray", 2, 2))

    def _start_ray(self) -> None:
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            ray.init(
                log_to_driver=self._show_logs,
                logging_level=logging.ERROR,
                **init_options(self._config, self._ray_folder),
            )
        except ConnectionError as error:
            raise ConfigError(
                f"there is no Ray cluster at {self._config.ray.address}: start one with 'ray start --head', or leave "
                "--address (ray.address) out to get a private one"
            ) from error
        if not is_private(self._config) and not asks_for_token():
            log.warning(
                "this Ray cluster asks nobody for a token: whoever reaches its ports can run code on its nodes "
                "(RAY_AUTH_MODE=token for every ray start, and here)"
            )
        if not is_private(self._config) and self._config.gateway.resource is None:
            # Clients come in where they are told to, by this process.
            self._config = with_gateway(self._config, resource=_resource_of_this_node())
            self._require_free_ports()
        self.daemons.watch()

    def _wait_for_nodes(self) -> None:
        """Until the cluster has what the pools need. Ray tells nobody of a node that joined; it has to be asked."""
        import ray

        wanted = demand(self._config)
        deadline_s = time.monotonic() + self._config.ray.join_timeout_s
        never: Future[None] = Future()
        while (missing := missing_resources(wanted, there := ray.cluster_resources())) is not None:  # type: ignore[no-untyped-call]
            if time.monotonic() >= deadline_s:
                raise ConfigError(missing)
            num_there = sum(there.get(name, 0) >= amount for name, amount in wanted.items())
            self._on_progress(Progress("resources", num_there, len(wanted)))
            futures.wait([never], timeout=_WATCH_PERIOD_S)

    def _start_serve(self) -> None:
        from ray import serve
        from ray.serve.context import _get_global_client, _set_global_client

        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # which it sets itself when it's imported
        # Serve remembers its controller beyond Ray's end; a cluster that this process had before had another one.
        _set_global_client(None)  # type: ignore[no-untyped-call]
        self._is_serve_ours = _get_global_client(raise_if_no_controller_running=False) is None
        if self._app in serve.status().applications:
            raise ConfigError(f"the cluster already serves {self._app!r}: choose another name with ray.app_name")
        # Clients come in by the gateway's own servers. A cluster that has proxies already keeps them, for others.
        serve.start(proxy_location="Disabled", logging_config=serve_logging(self._config))

    def deploy(self) -> None:
        """Returns when every replica is ready and the HTTP server answers."""
        from ray import serve

        self._is_deployed = True
        target = run_target(self._config, self._replicas or Replicas.shipped())
        # Serve is asked to begin, and not to wait: a call of its that waits for weights to load can't be taken back.
        [gateway] = self._call(
            serve.run_many, [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
        )
        shown: set[Progress] = set()
        while not self._is_running():
            self._show(shown)
            self.daemons.require_live()
            self._is_over.wait(_LOADING_PERIOD_S)
        self._show(shown, is_ready=True)
        self._gateway = gateway

    def _call(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Ray's calls that signals mustn't cut, short ones: ``stop`` waits for them."""
        called = self._home.submit(call, *args, **kwargs)
        self._calls.append(called)
        return called.result()

    def _is_running(self) -> bool:
        """Serve tells nobody of its progress; it has to be asked. Raises what kept a replica from starting."""
        found = self._status()
        if found.app_status.status == _GONE:
            raise Unavailable(f"somebody deleted {self._app!r} from the cluster while it started")
        if found.app_status.status == "DEPLOY_FAILED":
            heard = [one.message for one in found.deployment_statuses if one.status == "DEPLOY_FAILED"]
            raise explain("\n".join(heard) or found.app_status.message)
        is_running: bool = found.app_status.status == "RUNNING"
        return is_running

    def _status(self) -> Any:
        """Of our application alone, by what Serve asks itself with: ``serve.status()`` reads all configurations back,
        which takes a tenth of a second of one core, and of another in the controller, while weights are to be loaded.
        """
        from ray.serve.context import _get_global_client

        client: Any = _get_global_client()
        return client.get_serve_status(self._app)

    def _show(self, shown: set[Progress], *, is_ready: bool = False) -> None:
        from shoal.cluster import directory

        now = [Progress(f"{it.role} {it.replica_id}", it.num_done, it.num_total) for it in directory.loading(self._app)]
        num_wanted = num_replicas(self._config)
        num_ready = num_wanted if is_ready else len(directory.living(self._app))
        if self._compiles:
            now.append(Progress("kernels", 0 if waits_for_compiler(self._config) else 1, 1))
        now.append(Progress("replicas", num_ready, num_wanted))
        for progress in now:
            if progress not in shown:
                shown.add(progress)
                self._on_progress(progress)

    def drain(self) -> None:
        """Refuse new requests, let the open ones finish or cut them, then take the application back."""
        import ray

        if not (self._is_deployed and ray.is_initialized()):
            return
        drained = RayThread("ray-drain").submit(self._take_back, tuple(self._calls))
        self._calls.append(drained)
        # A Ray that was killed doesn't answer, so the answer can't be waited for alone.
        for _ in range(int(2 * grace_s(self._config) / _WATCH_PERIOD_S)):
            if futures.wait([drained], timeout=_WATCH_PERIOD_S).done or not self.daemons.live():
                break
        if not drained.done() or drained.exception() is not None:
            log.warning("Ray ended before it had drained: requests that were open, if any, were cut off")

    def _take_back(self, begun: Sequence[Future[Any]]) -> None:
        """Ends soon after ``_is_over``: Ray ends the process in which a call outlives it. ``begun`` are calls that a
        signal may have left alone: what one of them deploys can be taken back once it's there."""
        from ray import serve

        futures.wait(begun, timeout=_GIVE_UP_S)
        try:
            if self._gateway is not None:
                drained: Any = self._gateway.drain.remote()
                while not (_has_result(drained, _WATCH_PERIOD_S) or self._is_over.is_set()):
                    pass
        finally:
            # Of whom nobody waits for any more, a private Ray ends all; one that was joined keeps what isn't deleted.
            if not (self._is_over.is_set() and is_private(self._config)):
                serve.delete(self._app, _blocking=False)
                if self._gateway is None:
                    # Nobody was served yet, so nothing has to finish: Serve would wait for weights to load first.
                    _kill_replicas(self._app)
        while (is_left := self._status().app_status.status != _GONE) and not self._is_over.wait(_WATCH_PERIOD_S):
            pass
        is_last = not is_left and self._is_serve_ours and not is_private(self._config)
        if is_last and not serve.status().applications:
            serve.shutdown()  # type: ignore[no-untyped-call]  # whoever comes next may want proxies

    def stop(self, interrupts: Interrupts) -> None:
        """End Ray's processes, if they are ours: 1 to 3 s, not to be interrupted."""
        self._is_over.set()
        interrupts.wait(RayThread("ray-stop").submit(self._stop))

    def _stop(self) -> None:
        import ray

        futures.wait(self._calls, timeout=_GIVE_UP_S)
        if self._folder is not None:
            os.environ.pop(neighbours.VARIABLE, None)
        self.daemons.close()
        ray.shutdown(wait_for_processes=True)
        self._home.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _resource_of_this_node() -> str:
    """What Ray calls the node that this process has joined by, among its resources."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    [address] = [node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here]  # type: ignore[no-untyped-call]
    return f"{NODE_PREFIX}{address}"


def _kill_replicas(app: str) -> None:
    import ray
    from ray.serve._private.common import ReplicaID
    from ray.serve._private.constants import SERVE_NAMESPACE

    for actor in ray.util.list_named_actors(all_namespaces=True):
        name = actor["name"]
        if ReplicaID.is_full_id_str(name) and ReplicaID.from_full_id_str(name).deployment_id.app_name == app:
            with suppress(ValueError):  # it has ended meanwhile
                ray.kill(ray.get_actor(name, SERVE_NAMESPACE))


def _has_result(response: DeploymentResponse[Any], within_s: float) -> bool:
    """Whether a call has returned; raises what it raised."""
    try:
        response.result(timeout_s=within_s)
    except TimeoutError:
        return False
    return True
