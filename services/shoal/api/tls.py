"""Files of a certificate to what the gateway's servers need of it, refused before anything listens if they're wrong.

Files that are replaced are what the next connection gets; those that are wrong by then change nothing, and are logged.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import grpc
from cryptography import x509

from shoal.api.stamp import Stamp, stamp_of
from shoal.config import TlsConfig
from shoal.errors import ConfigError

T = TypeVar("T")

_log = logging.getLogger(__name__)


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """Of a gRPC server. With ``client_ca_file``, only clients with a certificate of that authority get in.

    Raises ConfigError that names the file that can't be read, isn't PEM, or doesn't fit the others.
    """
    changed = _Changes(tls)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        return changed.since_last(_configuration)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(tls),
        fetch,  # type: ignore[arg-type]  # none says that nothing changed
        require_client_authentication=tls.client_ca_file is not None,
    )


def server_context(tls: TlsConfig) -> ssl.SSLContext:
    """The same for an HTTP server."""
    context, changed = _context(tls), _Changes(tls)
    newest = context

    def before_handshake(connection: ssl.SSLObject, _name: str | None, _context_of_all: ssl.SSLContext) -> None:
        nonlocal newest
        newest = changed.since_last(_context) or newest
        connection.context = newest

    context.sni_callback = before_handshake  # called for each connection, whether it names a server or not
    return context


def expiry(tls: TlsConfig) -> Callable[[], float]:
    """Tells when the certificate expires that the servers show by now, in Unix time. Raises ConfigError as they do."""
    newest, changed = _expires_s(tls), _Changes(tls)

    def current() -> float:
        nonlocal newest
        newest = changed.since_last(_expires_s) or newest
        return newest

    return current


class _Changes:
    """Tells once of each change of the files."""

    def __init__(self, tls: TlsConfig) -> None:
        self._tls = tls
        self._stamps = self._look()

    def since_last(self, read: Callable[[TlsConfig], T]) -> T | None:
        """What ``read`` makes of files that are not those of the last time."""
        stamps = self._look()
        if stamps == self._stamps:
            return None
        self._stamps = stamps
        try:
            return read(self._tls)
        except ConfigError as error:
            _log.error("the certificate stays as it was: %s", error.message)
            return None

    def _look(self) -> list[Stamp]:
        files = (self._tls.cert_file, self._tls.key_file, self._tls.client_ca_file)
        return [stamp_of(file) for file in files if file is not None]


def _configuration(tls: TlsConfig) -> grpc.ServerCertificateConfiguration:
    _context(tls)  # gRPC takes anything, and fails at the first handshake
    client_ca = None if tls.client_ca_file is None else _read(tls.client_ca_file, "client_ca_file")
    pair = _read(tls.key_file, "key_file"), _read(tls.cert_file, "cert_file")
    return grpc.ssl_server_certificate_configuration([pair], client_ca)


def _context(tls: TlsConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _certificates(tls.cert_file, "cert_file")
    _read(tls.key_file, "key_file")
    try:
        context.load_cert_chain(tls.cert_file, tls.key_file, password="")  # empty: nobody is there to be asked
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"gateway.tls.key_file {tls.key_file} isn't the unencrypted PEM key of {tls.cert_file}: {error}"
        ) from error
    if tls.client_ca_file is not None:
        context.load_verify_locations(cadata=_certificates(tls.client_ca_file, "client_ca_file").decode("ascii"))
        context.verify_mode = ssl.CERT_REQUIRED
        # A session that is taken up again isn't asked for its certificate: not by other files, nor once it has expired.
        context.num_tickets = 0
        context.minimum_version = ssl.TLSVersion.TLSv1_3  # the one before remembers sessions without tickets, too
    return context


def _expires_s(tls: TlsConfig) -> float:
    _context(tls)  # files that the servers don't take say nothing
    try:
        leaf = x509.load_pem_x509_certificates(_read(tls.cert_file, "cert_file"))[0]
    except ValueError as error:
        raise ConfigError(f"gateway.tls.cert_file {tls.cert_file} holds no PEM certificate: {error}") from error
    return leaf.not_valid_after_utc.timestamp()


def _certificates(path: Path, name: str) -> bytes:
    pem = _read(path, name)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"gateway.tls.{name} {path} holds no PEM certificate: {error}") from error
    return pem


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"can't read gateway.tls.{name} {path}: {error.strerror}") from error
