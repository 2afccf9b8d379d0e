"""A throw-away certificate authority."""

from __future__ import annotations

from pathlib import Path

import grpc
import trustme


class Authority:
    """Has PEM files of itself (``ca.pem``) and of one client (``client.pem``, ``client.key``) in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self.ca_file = folder / "ca.pem"
        self.cert_file = folder / "client.pem"
        self.key_file = folder / "client.key"
        self._ca.cert_pem.write_to_path(self.ca_file)
        client = self._ca.issue_cert("client@example.com")
        client.private_key_pem.write_to_path(self.key_file)
        client.cert_chain_pems[0].write_to_path(self.cert_file)

    def server(self, *, asks_clients: bool = False) -> grpc.ServerCredentials:
        """Credentials of a server at localhost; with ``asks_clients`` it wants a certificate of each client."""
        cert = self._ca.issue_cert("localhost")
        pair = (cert.private_key_pem.bytes(), cert.cert_chain_pems[0].bytes())
        root = self._ca.cert_pem.bytes() if asks_clients else None
        return grpc.ssl_server_credentials([pair], root, require_client_auth=asks_clients)
