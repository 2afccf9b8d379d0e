"""How a grant finds its prefill replica: where its beginning is known already, if that one isn't too busy, and
otherwise the one that is less busy of two random ones; or, of replicas that share their cores, the busiest that has
room, since each reads all weights for whatever it answers. It doesn't find one that has failed it, as long as there is
another.

How busy one is, Serve says, and what this process has sent there itself. Serve alone wouldn't do: it forgets a replica
that wasn't asked for some seconds, and then prefers any other one, however busy; and of requests that come at once,
none counts for the next one.

Serve copies this module's code into the processes that route: it must hold no state (cluster/routes.py does).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from shoal.cluster import routes
from shoal.wire.handoff_messages import Grant

GRANTS = "shoal.cluster.router.GrantRouter"

MAX_LONGER = 4
"""How much longer the queue of a replica that knows a prompt's beginning may be than the shortest one. Beyond that,
waiting would take longer than computing it once more; and the other then knows it, too."""


class GrantRouter(RequestRouter):
    """Runs in the decode replicas, which hold a handle to the prefill deployment.

    Serve takes the one replica of the first rank that isn't full, and tells nobody but its router which."""

    pack_up_to = 0
    """Calls that a replica gets before another one gets any; 0: they are spread."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Serve's way to hand over what a pool's configuration says (cluster/graph.py)."""
        self.pack_up_to = kwargs.get("pack_up_to", 0)
        routes.let_pick(self.pick)

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: RequestMetadata | None = None
    ) -> PendingRequest | None:
        """Serve's index holds one request an id, but calls that are made while one request is answered share its id:
        for those that the index doesn't have, Serve would look without end. Each call's metadata are its own."""
        return next(
            (
                pending
                for pending in self._pending_requests_to_fulfill
                if pending.metadata is request_metadata and not pending.future.done()
            ),
            None,
        )

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            # If none of the ranks would do, wait a moment before the next try: Serve does so only where it's told to.
            pending_request.routing_context.should_backoff = True
        return self.choose(candidate_replicas, _call_of(pending_request))

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        call = _call_of(pending_request)
        if call is not None:
            routes.note(call, replica_id.unique_id)

    def pick(self, call: Grant) -> str | None:
        """The id of the replica that ``call`` will be sent to, unless that one refuses it. Any thread may ask."""
        ranks = self.choose(list(self.curr_replicas.values()), call)
        return ranks[0][0].replica_id.unique_id if ranks else None

    def choose(self, candidates: list[RunningReplica], call: Grant | None) -> list[list[RunningReplica]]:
        """Ranks to try, the better ones first: what was picked before all."""
        with routes.choosing:
            return self._choose(candidates, call)

    def _choose(self, candidates: list[RunningReplica], call: Grant | None) -> list[list[RunningReplica]]:
        if not candidates:
            return []
        excluded, keys = (frozenset[str](), ()) if call is None else (call.excluded, call.prefix_keys)
        # If all have failed it, one of them is still better than none.
        replicas = _without(candidates, excluded) or candidates
        by_id = {replica.replica_id.unique_id: replica for replica in replicas}
        lengths, silent = self._lengths(replicas), routes.silent()
        troubled = routes.troubled() if self.pack_up_to else frozenset[str]()
        ranked = self._packed(lengths, silent, troubled) if self.pack_up_to else _spread(lengths, silent)
        known = routes.affinity.best(keys, by_id.keys() - silent - troubled)
        shortest = min((length for one, length in lengths.items() if one not in silent), default=0)
        if known is not None and lengths[known] <= max(shortest + MAX_LONGER, self.pack_up_to - 1):
            ranked = [known, *(one for one in ranked if one != known)]
        if call is not None:
            picked = routes.take_picked(call)
            if picked in by_id and picked not in silent:
                ranked = [picked, *(one for one in ranked if one != picked)]
            routes.choose(call, ranked[0])
        return [[by_id[replica_id]] for replica_id in ranked]

    def _packed(self, lengths: dict[str, int], silent: frozenset[str], troubled: frozenset[str]) -> list[str]:
        """The busiest that has room before all others; of those that have none the least busy."""
        full = troubled | {one for one, length in lengths.items() if length >= self.pack_up_to}
        order = {one: length if one in full else -length for one, length in lengths.items()}
        # By name where two are alike, so that routers of several processes fill the same one.
        return sorted(lengths, key=lambda one: (one in silent, one in full, order[one], one))[:2]

    def _lengths(self, replicas: Iterable[RunningReplica]) -> dict[str, int]:
        """How many calls each replica is answering, at least: of those of other processes only Serve knows."""
        num_ours = routes.num_chosen()
        return {
            (name := replica.replica_id.unique_id): max(
                num_ours[name], self.replica_queue_len_cache.get(replica.replica_id) or 0
            )
            for replica in replicas
        }


def _spread(lengths: dict[str, int], silent: frozenset[str]) -> list[str]:
    """The less busy of two random ones, then the other one."""
    # One that doesn't even say whether it takes a call may hang, and others would wait behind that call.
    drawn = _draw([one for one in lengths if one not in silent], 2)
    drawn += _draw([one for one in lengths if one in silent], 2 - len(drawn))
    return sorted(drawn, key=lambda one: (one in silent, lengths[one]))


def _draw(names: list[str], number: int) -> list[str]:
    return random.sample(names, min(number, len(names)))


def _call_of(pending: PendingRequest | None) -> Grant | None:
    argument = pending.args[0] if pending is not None and pending.args else None
    return argument if isinstance(argument, Grant) else None


def _without(replicas: Iterable[RunningReplica], excluded: frozenset[str]) -> list[RunningReplica]:
    return [replica for replica in replicas if replica.replica_id.unique_id not in excluded]
