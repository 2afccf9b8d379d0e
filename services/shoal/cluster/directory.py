"""Who serves: replicas publish themselves in the Ray cluster's own key-value store, and others list the living.

::

    <app>/loading/<role>/<replica_id>     while weights load        report_loading
    <app>/entry/<role>/<replica_id>       from ready to ended       register, unregister

Values are JSON. A replica that dies can't take its entry back, so a reader compares with the names of the actors that
live, which Ray keeps right, and removes what a dead one left.

All functions block for a few round trips to the head node, however many replicas there are (a millisecond): on an event
loop call them in a thread, or ask a ``LivingPool``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray import serve
from ray.experimental import internal_kv

from shoal.wire.messages import Role

_NAMESPACE = "shoal"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One replica that is ready, or was until a part of it stopped working, or Serve told it to stop.

    Addresses are ``host:port``; ``handoff_address`` is decode's alone. By ``key``, in hex, decode knows a session of a
    prefill replica, and a gateway the decode process that it means.
    """

    app: str
    role: Role
    replica_id: str
    actor_name: str
    node_id: str
    pid: int
    metrics_address: str
    handoff_address: str | None = None
    key: str | None = None
    is_healthy: bool = True


@dataclass(frozen=True, slots=True)
class Loading:
    """How far a replica has come with its weights, in whatever parts its loader counts."""

    app: str
    role: Role
    replica_id: str
    actor_name: str
    num_done: int
    num_total: int


_Record = TypeVar("_Record", Entry, Loading)


def entry_of_this_replica(
    role: Role, *, metrics_address: str, handoff_address: str | None = None, key: str | None = None
) -> Entry:
    """The entry of the Serve replica that calls; elsewhere Serve raises RayServeException."""
    replica_id = serve.get_replica_context().replica_id
    return Entry(
        app=replica_id.deployment_id.app_name,
        role=role,
        replica_id=replica_id.unique_id,
        actor_name=replica_id.to_full_id_str(),
        node_id=ray.get_runtime_context().get_node_id(),
        pid=os.getpid(),
        metrics_address=metrics_address,
        handoff_address=handoff_address,
        key=key,
    )


def num_replicas() -> int:
    """How many Serve replicas like the one that calls there are to be; elsewhere Serve raises RayServeException."""
    return serve.get_replica_context().world_size


def register(entry: Entry) -> None:
    """Publish a replica as ready. Doing it again replaces the entry."""
    _put("entry", entry)
    _delete("loading", entry)


def unregister(entry: Entry) -> None:
    """Take a replica back before its process ends. Twice is a no-op."""
    _delete("entry", entry)


def publish_health(entry: Entry, is_healthy: bool) -> None:
    """Let a replica that is registered get work, or none. Its metrics can be found all the same."""
    register(dataclasses.replace(entry, is_healthy=is_healthy))


def report_loading(role: Role, num_done: int, num_total: int) -> None:
    """Tell whoever waits for this replica how far its weights are."""
    replica_id = serve.get_replica_context().replica_id
    app, unique_id = replica_id.deployment_id.app_name, replica_id.unique_id
    _put("loading", Loading(app, role, unique_id, replica_id.to_full_id_str(), num_done, num_total))


def living(app: str, role: Role | None = None) -> tuple[Entry, ...]:
    """All ready replicas of ``app`` (of one role) whose process lives and is healthy, sorted by role and id."""
    return tuple(entry for entry in registered(app, role) if entry.is_healthy)


def registered(app: str, role: Role | None = None) -> tuple[Entry, ...]:
    """The same with those that get no work: they aren't healthy, or finish what they have."""
    return _living("entry", Entry, app, role)


def loading(app: str) -> tuple[Loading, ...]:
    """The replicas of ``app`` that load their weights now, sorted by role and id."""
    return _living("loading", Loading, app, None)


def _living(kind: str, record: type[_Record], app: str, role: Role | None) -> tuple[_Record, ...]:
    # The store is read before the names: an actor has its name before its entry, so an entry without one is dead.
    prefix = f"{app}/{kind}/" if role is None else f"{app}/{kind}/{role}/"
    found = _read_all(_keys(prefix), record)
    alive = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    records = []
    for entry in found:
        if entry.actor_name in alive:
            records.append(entry)
        else:
            _delete(kind, entry)
    return tuple(records)


def _key(kind: str, record: Entry | Loading) -> str:
    return f"{record.app}/{kind}/{record.role}/{record.replica_id}"


def _keys(prefix: str) -> list[bytes]:
    keys: list[bytes] = internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE)
    return keys


def _put(kind: str, record: Entry | Loading) -> None:
    value = json.dumps(dataclasses.asdict(record))
    internal_kv._internal_kv_put(_key(kind, record), value, namespace=_NAMESPACE)


def _delete(kind: str, record: Entry | Loading) -> None:
    internal_kv._internal_kv_del(_key(kind, record), namespace=_NAMESPACE)


def _read_all(keys: Sequence[bytes], record: type[_Record]) -> list[_Record]:
    """In one round trip, by their keys' order; without those that were taken back meanwhile."""
    if not keys:
        return []
    store = internal_kv.internal_kv_get_gcs_client()  # type: ignore[no-untyped-call]
    values: dict[bytes, bytes] = store.internal_kv_multi_get(list(keys), _NAMESPACE.encode())
    return [_parse(values[key], record) for key in sorted(values)]


def _parse(value: bytes, record: type[_Record]) -> _Record:
    """Fields that this version doesn't know are left out."""
    fields: dict[str, Any] = json.loads(value)
    known = {field.name for field in dataclasses.fields(record)}
    return record(**{name: field for name, field in fields.items() if name in known})


class LivingPool:
    """Who of a pool lives, and who is there and gets no work. An answer is believed for ``BELIEVED_S``, and asked for
    again beside it.

    Replicas serve without Ray's head. While that one doesn't answer, who was there last is believed to be there still;
    it's asked once at a time, and not again for ``BELIEVED_S`` after it failed to.
    """

    BELIEVED_S = 1.0
    PATIENCE_S = 1.0
    """How long an answer is waited for where there is an older one."""
    FIRST_S = 5.0
    """And where nobody is known to live, so that there is nothing else to go by."""

    def __init__(self, app: str, role: Role, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._role: Role = role
        self._clock = clock
        self._ids: frozenset[str] = frozenset()
        self._unfit: frozenset[str] = frozenset()
        self._entries: dict[str, Entry] = {}
        self._seen_s = self._failed_s = self._asked_s = -math.inf
        self._asking: asyncio.Task[None] | None = None

    @property
    def unfit(self) -> frozenset[str]:
        """Ids of those that are registered and get no work; as old as what ``ids`` said last. Serve still offers one
        that hangs."""
        return self._unfit

    def key_of(self, replica_id: str) -> bytes:
        """What a session of that replica is known by; nothing if it isn't known, as old as what ``ids`` said last."""
        entry = self._entries.get(replica_id)
        return bytes.fromhex((None if entry is None else entry.key) or "")

    def with_key(self, key: bytes) -> str | None:
        """The replica that a session has this key of; ``None`` if there is no key, or it's nobody's."""
        return next((one for one, entry in self._entries.items() if key and entry.key == key.hex()), None)

    def address_of(self, replica_id: str) -> str:
        """Where that decode replica listens; nothing if it isn't known."""
        entry = self._entries.get(replica_id)
        return (None if entry is None else entry.handoff_address) or ""

    async def ids(self, *, now: bool = False) -> frozenset[str]:
        """Ids of the replicas that are ready, at most two seconds old; of an empty pool, or if asked to, ``now``.

        If Ray's head doesn't answer, those that were there last; none if there were none.
        """
        age_s = self._clock() - self._seen_s
        if now:
            await self._answered()  # what was asked before this
        elif self._ids and age_s < self.BELIEVED_S:
            return self._ids
        self._ask()
        # A pool that was just there most likely still is: nobody waits for the answer.
        if now or not self._ids or age_s >= 2 * self.BELIEVED_S:
            await self._answered()
        return self._ids

    def _ask(self) -> None:
        is_asking = self._asking is not None and not self._asking.done()
        if is_asking or self._clock() - self._failed_s < self.BELIEVED_S:
            return
        self._asked_s = self._clock()
        self._asking = asyncio.create_task(self._look())

    async def _answered(self) -> None:
        if self._asking is not None:
            patience_s = self.PATIENCE_S if self._ids else self.FIRST_S
            left_s = self._asked_s + patience_s - self._clock()
            await asyncio.wait([self._asking], timeout=max(0.0, left_s))

    async def _look(self) -> None:
        try:
            entries = await asyncio.to_thread(registered, self._app, self._role)
        except Exception:  # noqa: BLE001 - whatever Ray raises, those that serve go on
            _log.warning("Ray's head doesn't say who serves", exc_info=True)
            self._failed_s = self._clock()
            return
        self._ids = frozenset(entry.replica_id for entry in entries if entry.is_healthy)
        self._unfit = frozenset(entry.replica_id for entry in entries if not entry.is_healthy)
        self._entries = {entry.replica_id: entry for entry in entries if entry.is_healthy}
        self._seen_s = self._clock()
