"""Who may ask: tenants, the keys that they show, and what each of them may do.

A key is ``sk-shoal-ID-SECRET``. The operator's file (``gateway.keys_file``) has the id, by which a key is found, and
SHA-256 of the whole: a secret of 256 random bits needs no slower hash. The file is looked at again when it changes, so
that keys come and go without a restart.
"""

from __future__ import annotations

import enum
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoal.api.places import Places
from shoal.api.stamp import stamp_of
from shoal.config import RateConfig
from shoal.config.rate import RateLimit
from shoal.config.yaml_file import read_yaml
from shoal.errors import ConfigError, InvalidRequest, PermissionDenied, RateLimited, Unauthenticated

_log = logging.getLogger(__name__)

_KEY = re.compile(r"sk-shoal-([0-9a-f]{8})-[A-Za-z0-9_-]{43}")
_LOOK_EVERY_S = 1.0
_NOBODY = "0" * 64


class Role(enum.StrEnum):
    """What a key opens."""

    GENERATE = "generate"
    METRICS = "metrics"


class TenantConfig(BaseModel):
    """One tenant in the file. Its cache is its own; two keys of it share all that is limited here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: dict[Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")], Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = (
        Field({}, description="By the key's id, SHA-256 of the key in hex; shoal keys new writes both.")
    )
    roles: frozenset[Role] = Field(frozenset({Role.GENERATE}), description="What its keys open: generate, metrics.")
    max_running: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Requests at once, each of several prompts counting; more get 429."
    )
    max_kv_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Tokens of its prompts and answers at once, each answer at its longest: so much K/V can be its own "
        "in a pool. More get 429.",
    )
    requests: RateConfig | None = Field(None, description="How often it may ask; more often gets 429.")


class KeysFile(BaseModel):
    """The file as a whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")], TenantConfig] = {}

    @model_validator(mode="after")
    def _keys_are_one_tenant_s(self) -> KeysFile:
        ids = [key_id for tenant in self.tenants.values() for key_id in tenant.keys]
        if twice := {key_id for key_id in ids if ids.count(key_id) > 1}:
            raise ValueError(f"key {min(twice)} is there twice: make another one of the two")
        return self


class Tenant:
    """Whose requests these are. ``clock`` is monotonic seconds."""

    def __init__(self, name: str, config: TenantConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.config = config
        self.num_kv_tokens = 0
        self._places = Places(clock)
        self._clock = clock
        self._rate = None if config.requests is None else RateLimit(config.requests, clock)

    @property
    def num_running(self) -> int:
        return self._places.num_taken

    def changed(self, config: TenantConfig) -> None:
        """Other limits from now on; what runs still counts."""
        if config.requests != self.config.requests:
            self._rate = None if config.requests is None else RateLimit(config.requests, self._clock)
        self.config = config

    def require(self, role: Role | None) -> None:
        """Raises PermissionDenied unless its keys open this; ``None`` is what any key opens."""
        if role is not None and role not in self.config.roles:
            raise PermissionDenied(f"this key doesn't have the role {role}: ask whoever gave it to you")

    @contextmanager
    def running(self, *, ran: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Count a request for as long as the block lasts; ``ran`` is as for ``Places.taken``. Raises RateLimited."""
        if self.config.max_running is not None and self.num_running >= self.config.max_running:
            raise RateLimited(
                f"{self.num_running} requests of yours are running, which is what you may: wait for one",
                retry_after_s=self._places.wait_s(),
            )
        if self._rate is not None and not self._rate.take():
            raise RateLimited("you ask more often than you may", retry_after_s=self._rate.wait_s)
        with self._places.taken(ran=ran):
            yield

    @contextmanager
    def running_more(self, num_more: int, *, ran: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Count further prompts of a request that counts. Raises RateLimited, or InvalidRequest if they never may."""
        most = self.config.max_running
        if most is not None and num_more >= most:
            raise InvalidRequest(
                f"{num_more + 1} prompts in one request, and {most} of yours may run at once: send fewer",
                param="prompt",
            )
        if most is not None and (num_missing := self.num_running + num_more - most) > 0:
            raise RateLimited(
                f"{self.num_running} requests of yours are running, of {most} that may, and this one has "
                f"{num_more + 1} prompts: wait for some",
                retry_after_s=self._places.wait_s(num_missing),
            )
        with self._places.taken(num_more, ran=ran):
            yield

    @contextmanager
    def holding(self, num_tokens: int) -> Iterator[None]:
        """Count K/V for as long as the block lasts. Raises RateLimited, or InvalidRequest if it never may."""
        most = self.config.max_kv_tokens
        if most is not None and num_tokens > most:
            raise InvalidRequest(
                f"prompt and answer may come to {num_tokens} tokens, and your key allows {most} at once: "
                "shorten the prompt or say a lower max_tokens (without one, an answer may fill the context)"
            )
        if most is not None and self.num_kv_tokens + num_tokens > most:
            raise RateLimited(
                f"requests of yours with {self.num_kv_tokens} tokens are running, of {most} that may be: wait for one",
                retry_after_s=self._places.wait_s(),
            )
        self.num_kv_tokens += num_tokens
        try:
            yield
        finally:
            self.num_kv_tokens -= num_tokens


class Keyring:
    """The tenants of a file, which is read again once it has changed. Raises ConfigError if it can't be at first.

    One that is wrong later changes nothing: it's logged, and who had a key still has it.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._tenants: dict[str, Tenant] = {}
        self._keys: dict[str, tuple[str, Tenant]] = {}
        self._stamp = stamp_of(path)
        self._looked_s = clock()
        self._take(read_keys(path))

    def tenant(self, authorization: str | None) -> Tenant:
        """Whose key ``authorization`` (the header's value) brings. Raises Unauthenticated."""
        self._look()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("this server wants a key: send it as Authorization: Bearer KEY")
        found = _KEY.fullmatch(key.strip())
        digest, tenant = self._keys.get(found[1] if found else "", (_NOBODY, None))
        # Compared whoever it claims to be, so that an answer's time tells nothing.
        is_theirs = hmac.compare_digest(digest, digest_of(key.strip()))
        if tenant is None or not is_theirs:
            raise Unauthenticated("this key isn't known here: it may have been taken back")
        return tenant

    def _look(self) -> None:
        if self._clock() - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = self._clock()
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(read_keys(self._path))
        except ConfigError as error:
            _log.error("the keys stay as they were: %s", error.message)

    def _take(self, file: KeysFile) -> None:
        # Who is gone may come back, and what runs still counts then.
        self._keys = {}
        for name, config in file.tenants.items():
            tenant = self._tenants.setdefault(name, Tenant(name, config, self._clock))
            tenant.changed(config)
            self._keys.update({key_id: (digest, tenant) for key_id, digest in config.keys.items()})


def new_key() -> tuple[str, str]:
    """A key, and its id."""
    key_id = secrets.choice("abcdef") + secrets.token_hex(4)[1:]  # in YAML no number, with or without quotes
    return f"sk-shoal-{key_id}-{secrets.token_urlsafe(32)}", key_id


def digest_of(key: str) -> str:
    """What the file has of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> KeysFile:
    """Raises ConfigError that names what is wrong in which place."""
    try:
        return KeysFile.model_validate(read_yaml(path))
    except ValidationError as error:
        lines = (f"  {'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors())
        raise ConfigError(_withheld(f"the keys in {path} are refused:\n" + "\n".join(lines))) from None
    except OSError as error:
        raise ConfigError(
            f"can't read the keys in {path}: {error.strerror}; shoal keys new makes such a file"
        ) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        # Not its own words: they quote the file.
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise ConfigError(f"the keys in {path} aren't YAML{where}: shoal keys new makes such a file") from None


def write_keys(path: Path, file: KeysFile) -> None:
    """All at once; a new file is for its owner's eyes only, another keeps its owner, group and mode, so that who could
    read it still can. Raises ConfigError."""
    tree = file.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    path = path.resolve()  # what a link leads to, as whoever reads by it does
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            yaml.safe_dump(tree, stream, sort_keys=True)
            if path.exists():
                was, made = path.stat(), os.fstat(descriptor)
                if (made.st_uid, made.st_gid) != (was.st_uid, was.st_gid):
                    _give(descriptor, path, was)
                os.fchmod(descriptor, stat.S_IMODE(was.st_mode))
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"can't write the keys to {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):  # there is none any more, if all went well
            draft.unlink()


def _give(descriptor: int, path: Path, was: os.stat_result) -> None:
    try:
        os.fchown(descriptor, was.st_uid, was.st_gid)
    except PermissionError as error:
        raise ConfigError(
            f"{path} would no longer belong to user {was.st_uid} and group {was.st_gid}, and the gateway might not "
            "read it then: change it as that user, or as root"
        ) from error


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """One at a time: what is read within the block isn't changed by others before it is written. Raises ConfigError."""
    try:
        lock = os.open(path.resolve().parent, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"can't write the keys to {path}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _withheld(text: str) -> str:
    """Without a key that stands where only its id should."""
    return re.sub(r"sk-shoal-[\w-]+", "sk-shoal-…", text)
