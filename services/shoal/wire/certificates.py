"""A process's certificate for connections to others of Shoal's: which files it is in, and whether it will do.

::

    folder/ROLE/ca.crt     authorities whose certificates are believed
    folder/ROLE/tls.crt    the role's own certificate, and those between it and an authority
    folder/ROLE/tls.key    its private key, without a passphrase

These are the names that a Kubernetes Secret of cert-manager has. A certificate says its role by a DNS name; addresses
come from Ray, and stand in no certificate.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from shoal.errors import ConfigError
from shoal.wire.messages import Role

AUTHORITY_FILE, CHAIN_FILE, KEY_FILE = "ca.crt", "tls.crt", "tls.key"


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a process shows, and whom it believes: PEM. ``expires_s`` is Unix time."""

    authorities: bytes
    chain: bytes
    key: bytes
    expires_s: float


def name_of(role: Role) -> str:
    """The DNS name by which a certificate says that it is of ``role``. No server has it as an address."""
    return f"{role}.shoal.internal"


def read_certificate(folder: Path, role: Role) -> Certificate:
    """Raises ConfigError that names the file that is missing or no PEM, doesn't fit the others, isn't of ``role``, or
    isn't valid now."""
    home = folder / role
    authorities, chain, key = (_read(home / name) for name in (AUTHORITY_FILE, CHAIN_FILE, KEY_FILE))
    issued = _parsed(chain, home / CHAIN_FILE)
    leaf = issued[0]
    _require_key(key, leaf, home)
    if not _leads_to(issued, _parsed(authorities, home / AUTHORITY_FILE)):
        raise ConfigError(f"{home / CHAIN_FILE} isn't signed by an authority in {home / AUTHORITY_FILE}")
    if name_of(role) not in _names(leaf):
        raise ConfigError(f"{home / CHAIN_FILE} isn't {role}'s: it must be for the DNS name {name_of(role)}")
    now = dt.datetime.now(dt.UTC)
    if leaf.not_valid_before_utc > now:
        raise ConfigError(f"{home / CHAIN_FILE} isn't valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    if leaf.not_valid_after_utc < now:
        raise ConfigError(
            f"{home / CHAIN_FILE} expired on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: shoal certs --force makes "
            "another one of the same authority"
        )
    return Certificate(authorities, chain, key, leaf.not_valid_after_utc.timestamp())


def require_trust(folder: Path, roles: Iterable[Role]) -> None:
    """Raises ConfigError unless decode and each of ``roles`` would believe each other. All files must be well by
    themselves."""
    for role in roles:
        for shown, believing in ((role, "decode"), ("decode", role)):
            chain, authorities = folder / shown / CHAIN_FILE, folder / believing / AUTHORITY_FILE
            if not _leads_to(_parsed(_read(chain), chain), _parsed(_read(authorities), authorities)):
                raise ConfigError(
                    f"{believing} wouldn't believe {shown}: {chain} isn't signed by an authority in {authorities} "
                    "(shoal certs makes all roles' of one)"
                )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"can't read {path}: {error.strerror}; tls.folder must have a folder for each role on this host, as shoal "
            "certs makes them"
        ) from error


def _parsed(pem: bytes, path: Path) -> Sequence[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"{path} holds no PEM certificate: {error}") from error


def _require_key(pem: bytes, leaf: x509.Certificate, home: Path) -> None:
    try:
        public = load_pem_private_key(pem, None).public_key()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{home / KEY_FILE} isn't an unencrypted PEM key: {error}") from error
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if public.public_bytes(*form) != leaf.public_key().public_bytes(*form):
        raise ConfigError(f"{home / KEY_FILE} isn't the key of {home / CHAIN_FILE}")


def _leads_to(chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]) -> bool:
    """Whether each certificate issued the one before it, up to one that an authority did."""
    if any(_has_issued(one, chain[0]) for one in authorities):
        return True
    for below, above in pairwise(chain):
        if not _has_issued(above, below):
            return False
        if any(_has_issued(one, above) for one in authorities):
            return True
    return False


def _has_issued(above: x509.Certificate, below: x509.Certificate) -> bool:
    try:
        below.verify_directly_issued_by(above)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _names(leaf: x509.Certificate) -> Sequence[str]:
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return ()
    return found.value.get_values_for_type(x509.DNSName)
