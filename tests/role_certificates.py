"""Certificates of Shoal's roles as tests want them: by another authority, for another role, or expired."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import grpc
import trustme

from shoal.messages import Role
from shoal.rpc.certificates import AUTHORITY_FILE, CHAIN_FILE, KEY_FILE, name_of

YESTERDAY = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
_ROLES: tuple[Role, ...] = ("gateway", "prefill", "decode")


class Roles:
    """An authority, and the folder that ``tls.folder`` names. Its files are written anew by each ``write``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ca = trustme.CA()
        for role in _ROLES:
            self.write(role)

    def write(
        self,
        role: Role,
        *,
        name: str | None = None,
        not_after: dt.datetime | None = None,
        not_before: dt.datetime | None = None,
    ) -> None:
        """The files of ``role``, for its own name unless another is given."""
        issued = self._issue(name or name_of(role), not_after, not_before)
        home = self.folder / role
        home.mkdir(parents=True, exist_ok=True)
        self._ca.cert_pem.write_to_path(home / AUTHORITY_FILE)
        issued.private_key_pem.write_to_path(home / KEY_FILE)
        issued.cert_chain_pems[0].write_to_path(home / CHAIN_FILE)

    def renew(self, other: Roles) -> None:
        """All files are by ``other``'s authority from now on."""
        self._ca = other._ca
        for role in _ROLES:
            self.write(role)

    def channel_credentials(self, name: str | None, not_after: dt.datetime | None = None) -> grpc.ChannelCredentials:
        """Of a client that isn't ours; without a name it shows no certificate."""
        if name is None:
            return grpc.ssl_channel_credentials(self._ca.cert_pem.bytes())
        issued = self._issue(name, not_after)
        return grpc.ssl_channel_credentials(
            self._ca.cert_pem.bytes(), issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes()
        )

    def server_credentials(self, name: str, not_after: dt.datetime | None = None) -> grpc.ServerCredentials:
        """Of a server that isn't ours, and takes whoever comes."""
        issued = self._issue(name, not_after)
        return grpc.ssl_server_credentials([(issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())])

    def _issue(
        self, name: str, not_after: dt.datetime | None, not_before: dt.datetime | None = None
    ) -> trustme.LeafCert:
        return self._ca.issue_cert(name, not_after=not_after, not_before=not_before)
