"""Certificates of Shoal's roles as tests want them: by another authority, for another role, or expired."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path

import grpc
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from shoal.wire.certificates import AUTHORITY_FILE, CHAIN_FILE, KEY_FILE, name_of
from shoal.wire.messages import Role

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

    def credentials_of(self, names: Sequence[x509.GeneralName], common_name: str = "") -> grpc.ChannelCredentials:
        """Of a client whose certificate says so much and no more of whose it is."""
        key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
        signing = load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        assert isinstance(signing, ec.EllipticCurvePrivateKey)
        common = [x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)] if common_name else []
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(common))
            .issuer_name(x509.load_pem_x509_certificate(self._ca.cert_pem.bytes()).subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(days=1))
        )
        if names:
            certificate = certificate.add_extension(x509.SubjectAlternativeName(names), critical=not common)
        return grpc.ssl_channel_credentials(
            self._ca.cert_pem.bytes(),
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            certificate.sign(signing, hashes.SHA256()).public_bytes(Encoding.PEM),
        )

    def server_credentials(self, name: str, not_after: dt.datetime | None = None) -> grpc.ServerCredentials:
        """Of a server that isn't ours, and takes whoever comes."""
        issued = self._issue(name, not_after)
        return grpc.ssl_server_credentials([(issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())])

    def _issue(
        self, name: str, not_after: dt.datetime | None, not_before: dt.datetime | None = None
    ) -> trustme.LeafCert:
        return self._ca.issue_cert(name, not_after=not_after, not_before=not_before)
