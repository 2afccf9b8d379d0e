"""The client's side of TLS."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from shoal.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. Without ``ca_file``, the well-known authorities are trusted.

    ``cert_file`` (with those between it and the root) and ``key_file`` (without a passphrase) are for servers that
    ask clients for a certificate.
    """

    ca_file: Path | str | None = None
    cert_file: Path | str | None = None
    key_file: Path | str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a gRPC channel. Raises ConfigError for a file that can't be read, or isn't what it should be."""
        if (self.cert_file is None) != (self.key_file is None):
            raise ConfigError("a client's certificate needs its key: set both cert_file and key_file, or neither")
        self._check()
        return grpc.ssl_channel_credentials(_read(self.ca_file), _read(self.key_file), _read(self.cert_file))

    def _check(self) -> None:
        """Let OpenSSL read the files: gRPC tells of a bad one only on stderr."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.ca_file is not None:
                context.load_verify_locations(self.ca_file)
        except OSError as error:
            raise ConfigError(f"can't use {self.ca_file}: {error}; it must hold certificates in PEM") from error
        try:
            if self.cert_file is not None:
                context.load_cert_chain(self.cert_file, self.key_file, password="")
        except OSError as error:
            raise ConfigError(
                f"can't use {self.cert_file} with {self.key_file}: {error}; they must be a certificate "
                "and its key in PEM, the key without a passphrase"
            ) from error


def _read(path: Path | str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
