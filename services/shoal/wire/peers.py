"""Both ends of a connection between two of Shoal's processes, by mutual TLS: who may talk to whom is said by role.

::

    prefill ── HandoffService ──> decode <── WorkerService ── gateway

Each end wants a certificate of its own authority from the other one. Who dials looks for decode's name in it
(``PeerTls.channel``), whatever the address is; decode looks, at each call, for the role that the service is for
(``RoleGate``).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from shoal.errors import ConfigError, UntrustedPeer
from shoal.v1 import handoff_pb2, worker_pb2
from shoal.wire.certificates import Certificate, name_of, read_certificate
from shoal.wire.messages import Role
from shoal.wire.options import Options
from shoal.wire.statuses import abort

_log = logging.getLogger(__name__)

CALLERS: Mapping[str, Role] = {
    handoff_pb2.DESCRIPTOR.services_by_name["HandoffService"].full_name: "prefill",
    worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name: "gateway",
}
"""By service of decode's server, the one role that may call it."""

# What gRPC says of a handshake that failed, from the most to the least special. Where the other end found fault with
# us, TLS 1.3 tells us no more than that it closed the connection; its own log says why.
_REFUSALS = (
    ("Hostname Verification Check failed", "its certificate isn't decode's"),
    ("certificate has expired", "its certificate has expired: give it another one"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate isn't of an authority in our ca.crt"),
    ("WRONG_VERSION_NUMBER", "it speaks plain text: give it the same tls.folder"),
)


class PeerTls:
    """What one process shows to the others. Files that change are what the next connection uses; old ones go on.

    Thread-safe: gRPC asks from threads of its own. Raises ConfigError as ``read_certificate`` does. Files that are
    wrong later change nothing: it's logged, and the last good ones stay.
    """

    def __init__(self, folder: Path, role: Role) -> None:
        self.role = role
        self._folder = folder
        self._lock = threading.Lock()
        self._current = read_certificate(folder, role)
        self._complaint = ""

    def current(self) -> Certificate:
        """The files as they are now."""
        with self._lock:
            try:
                self._current = read_certificate(self._folder, self.role)
                self._complaint = ""
            except ConfigError as error:
                if error.message != self._complaint:  # once, not at each connection
                    self._complaint = error.message
                    _log.error("the certificate stays as it was: %s", error.message)
            return self._current

    def server_credentials(self) -> grpc.ServerCredentials:
        """They want a certificate from whoever calls, and are read again at each handshake."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._configuration, require_client_authentication=True
        )

    def channel(self, address: str, options: Options) -> grpc.aio.Channel:
        """To decode at ``address``. Whatever else is there fails the first call, and ``refusal`` says why."""
        mine = self.current()
        credentials = grpc.ssl_channel_credentials(mine.authorities, mine.key, mine.chain)
        named = (*options, ("grpc.ssl_target_name_override", name_of("decode")))
        return grpc.aio.secure_channel(address, credentials, options=named)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        mine = self.current()
        return grpc.ssl_server_certificate_configuration([(mine.key, mine.chain)], mine.authorities)


def open_channel(address: str, options: Options, tls: PeerTls | None) -> grpc.aio.Channel:
    """To decode at ``address``; without ``tls`` in plain text."""
    return grpc.aio.insecure_channel(address, options=options) if tls is None else tls.channel(address, options)


def refusal(error: grpc.aio.AioRpcError, address: str) -> UntrustedPeer | None:
    """What the certificate at ``address`` had wrong, if that is what a call ended with."""
    details = error.details() or ""
    for text, meaning in _REFUSALS:
        if error.code() is grpc.StatusCode.UNAVAILABLE and text in details:
            return UntrustedPeer(f"decode at {address} can't be trusted: {meaning}")
    return None


class RoleGate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs alone
    """Lets in whom ``CALLERS`` says, by the certificate of the connection; a service that isn't there is closed."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # there is no such method, and gRPC says so
        service = handler_call_details.method.strip("/").partition("/")[0]
        return _guarded(handler, service)


def _guarded(handler: Any, service: str) -> Any:
    """The same method, for its callers alone. It writes what it answers, and doesn't yield it, if that is a stream."""
    kinds = ("unary", "stream")
    kind = f"{kinds[handler.request_streaming]}_{kinds[handler.response_streaming]}"
    behaviour = getattr(handler, kind)

    async def answered(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        names = _names(context)
        role = CALLERS.get(service)
        if role is None or name_of(role) not in names:
            shown = ", ".join(sorted(names)) or "no DNS name"
            _log.warning("%s was refused to %s, who shows %s", service, context.peer(), shown)
            await abort(context, UntrustedPeer(f"{service} is for {role or 'nobody'} alone: show its certificate"))
        return await behaviour(request, context)

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(answered, handler.request_deserializer, handler.response_serializer)


def _names(context: grpc.aio.ServicerContext[Any, Any]) -> frozenset[str]:
    """DNS names alone: what stands in a certificate as an e-mail address, a URI or its subject's name is no role."""
    shown = context.auth_context().get("peer_dns", ())
    return frozenset(name.decode(errors="replace") for name in shown)
