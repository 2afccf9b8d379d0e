"""What a key opens: every path and every method has a line here, and what has none wants a key, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.api.backend import GatewayObserver
from shoal.api.keys import Keyring, Role, Tenant, TenantConfig
from shoal.config.rate import TOLD, RateLimit
from shoal.errors import ShoalError, Unauthenticated

OPEN = frozenset({"/health", "/readyz", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
"""For probes, which have no key. They tell how many replicas are ready, and no more."""

_ROLES = {
    "/v1/": Role.GENERATE,
    "/tokenize": Role.GENERATE,  # and /tokenizer_info
    "/detokenize": Role.GENERATE,
    "/shoal.v1.InferenceService/": Role.GENERATE,
    "/metrics": Role.METRICS,
}
"""By what a path, or gRPC's ``/service/method``, begins with. Others open to any key."""

ANYBODY = Tenant("default", TenantConfig(roles=frozenset(Role)))
"""Who asks where no keys are wanted."""

_log = structlog.get_logger(__name__)
_asking: ContextVar[Tenant | None] = ContextVar("asking", default=None)


class Access:
    """Lets in who shows a key of ``keyring``; without one, everybody."""

    def __init__(self, keyring: Keyring | None, observer: GatewayObserver) -> None:
        self._keyring = keyring
        self._observer = observer
        self._refusals = RateLimit(TOLD)

    @property
    def wants_keys(self) -> bool:
        return self._keyring is not None

    @contextmanager
    def admitted(self, place: str, shown: Sequence[str], peer: str | None = None) -> Iterator[None]:
        """For the block, ``asking`` says who it is, by what ``shown`` has: the values of the header authorization.

        Raises Unauthenticated or PermissionDenied, which are counted, and logged with ``peer``, the address it came
        from.
        """
        if place in OPEN:
            yield
            return
        token = _asking.set(self._tenant(place, shown, peer))
        try:
            yield
        finally:
            _asking.reset(token)

    def _tenant(self, place: str, shown: Sequence[str], peer: str | None) -> Tenant:
        if self._keyring is None:
            return ANYBODY
        tenant: Tenant | None = None
        try:
            if len(shown) > 1:  # a proxy may have looked at another one
                raise Unauthenticated("one header Authorization, please")
            tenant = self._keyring.tenant(shown[0] if shown else None)
            tenant.require(role_of(place))
        except ShoalError as error:
            self._observer.rejected(error.code)
            if self._refusals.take():
                name = None if tenant is None else tenant.name
                _log.warning("nobody is let in by what was shown", code=error.code, tenant=name, peer=peer)
            raise
        return tenant


def role_of(place: str) -> Role | None:
    """Which role opens a path or method; ``None``: any key does."""
    return next((role for prefix, role in _ROLES.items() if place.startswith(prefix)), None)


def asking() -> Tenant:
    """Who is being answered. Raises Unauthenticated where nobody was let in: a door without a guard is shut."""
    tenant = _asking.get()
    if tenant is None:
        raise Unauthenticated("nobody was let in here")
    return tenant


class KeyGuard:
    """ASGI middleware: ``access`` for HTTP."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        shown = Headers(scope=scope).getlist("authorization")
        client = scope.get("client")
        with self._access.admitted(_routed(scope), shown, client[0] if client else None):
            await self._app(scope, receive, send)


def _routed(scope: Scope) -> str:
    """The path that routes are found by: without the prefix that a server before this one may have."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(prefix) if prefix and path.startswith(f"{prefix}/") else path
