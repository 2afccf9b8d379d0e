"""Files of a certificate to the credentials of a gRPC server, refused before anything listens if they're wrong."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from shoal.config import TlsConfig
from shoal.errors import ConfigError


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """With ``client_ca_file``, only clients with a certificate of that authority get in.

    Raises ConfigError that names the file that can't be read, isn't PEM, or doesn't fit the others.
    """
    certificate = _certificates(tls.cert_file, "cert_file")
    client_ca = None if tls.client_ca_file is None else _certificates(tls.client_ca_file, "client_ca_file")
    key = _read(tls.key_file, "key_file")
    try:
        # gRPC takes anything, and fails at the first handshake. An empty password: nobody is there to be asked.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.cert_file, tls.key_file, password="")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"gateway.tls.key_file {tls.key_file} isn't the unencrypted PEM key of {tls.cert_file}: {error}"
        ) from error
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )


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
