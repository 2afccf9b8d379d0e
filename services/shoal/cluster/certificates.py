"""A certificate authority for development, and a certificate of it for each role.

::

    folder/ca.crt, ca.key                   the authority: its key stays where certificates are made
    folder/ROLE/ca.crt, tls.crt, tls.key    what a host needs that runs the role, and no more

Every file is its owner's alone. An authority that is there already is used again, so that certificates which are
replaced are believed by those who know it.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shoal.errors import ConfigError
from shoal.wire.certificates import AUTHORITY_FILE, CHAIN_FILE, KEY_FILE, name_of
from shoal.wire.messages import Role

ROLES: Sequence[Role] = get_args(Role)
AUTHORITY_KEY_FILE = "ca.key"
AUTHORITY_DAYS = 3650
DAYS = 365
HOSTS = ("localhost", "127.0.0.1", "::1")
_CLOCKS_DIFFER = dt.timedelta(minutes=5)
_NO_USAGE = dict.fromkeys(
    (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    ),
    False,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Terms:
    """``hosts`` are names or IP addresses that clients reach the gateway by: its certificate may then be that of
    ``gateway.tls``, too."""

    days: int = DAYS
    hosts: Sequence[str] = HOSTS


def make_certificates(
    folder: Path, *, days: int | None = None, gateway_hosts: Sequence[str] = (), replaces: bool = False
) -> Terms:
    """Write a certificate and key for each role, and the authority if it isn't there. Returns for how long and whom.

    With ``replaces``, the roles' files may be there already; what isn't said is as it was in those. Raises ConfigError.
    """
    before = _terms_of(folder / "gateway" / CHAIN_FILE) if replaces else Terms()
    days, gateway_hosts = days or before.days, gateway_hosts or before.hosts
    paths = [folder / role / name for role in ROLES for name in (AUTHORITY_FILE, CHAIN_FILE, KEY_FILE)]
    there = [path for path in paths if path.exists()]
    if there and not replaces:
        raise ConfigError(f"{there[0]} is there already: --force replaces it, by the same authority")
    authority = _authority(folder)
    until = authority.certificate.not_valid_after_utc
    if until < _now() + dt.timedelta(days=days):
        raise ConfigError(
            f"{folder / AUTHORITY_FILE} expires on {until:%Y-%m-%d}, before what it would sign: say fewer --days, or "
            "begin a new authority in another folder"
        )
    for role in ROLES:
        files = _issued(authority, role, days, gateway_hosts if role == "gateway" else ())
        for name, content in files.items():
            _write(folder / role / name, content)
    return Terms(days, gateway_hosts)


def _terms_of(path: Path) -> Terms:
    """Of the gateway's certificate, if it's there and one."""
    try:
        leaf = x509.load_pem_x509_certificate(path.read_bytes())
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return Terms()
    hosts = [name for name in names.get_values_for_type(x509.DNSName) if name != name_of("gateway")]
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return Terms((leaf.not_valid_after_utc - leaf.not_valid_before_utc).days or 1, (*hosts, *addresses))


def _authority(folder: Path) -> Authority:
    """The one of ``folder``, or a new one."""
    certificate, key = folder / AUTHORITY_FILE, folder / AUTHORITY_KEY_FILE
    if certificate.exists() != key.exists():
        there, missing = (certificate, key) if certificate.exists() else (key, certificate)
        raise ConfigError(
            f"{there} is there without the other half of the authority: bring {missing.name} back for as long as this "
            "takes, or begin a new authority in another folder"
        )
    if not certificate.exists():
        made = _new_authority()
        _write(key, _pem(made.key))
        _write(certificate, made.certificate.public_bytes(Encoding.PEM))
    try:
        loaded = load_pem_private_key(key.read_bytes(), None)
        known = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"can't read the authority in {folder}: {error}") from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.public_key() != known.public_key():
        raise ConfigError(f"{key} isn't the key of {certificate}, as shoal certs made it")
    return Authority(known, loaded)


def _new_authority() -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"Shoal development authority {secrets.token_hex(4)}")
    usage = x509.KeyUsage(**{**_NO_USAGE, "key_cert_sign": True, "crl_sign": True})
    certificate = (
        _begun(name, name, key, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def _issued(authority: Authority, role: Role, days: int, hosts: Iterable[str]) -> Mapping[str, bytes]:
    """A role's files, the certificate last: who reads in between has a key that doesn't fit, and reads again."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.DNSName(name_of(role)), *(_host(host) for host in hosts)]
    usage = x509.KeyUsage(**{**_NO_USAGE, "digital_signature": True})
    both_ends = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    issuer = authority.certificate
    certificate = (
        _begun(_name(f"shoal {role}"), issuer.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(both_ends, critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return {
        AUTHORITY_FILE: issuer.public_bytes(Encoding.PEM),
        KEY_FILE: _pem(key),
        CHAIN_FILE: certificate.public_bytes(Encoding.PEM),
    }


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _CLOCKS_DIFFER)
        .not_valid_after(_now() + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    try:
        name = text.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    if not name:
        raise ConfigError(f"{text!r} is neither a host name nor an IP address")
    return x509.DNSName(name)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _write(path: Path, content: bytes) -> None:
    """All at once, for its owner's eyes only."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise ConfigError(f"can't write {path}: {error.strerror}") from error
