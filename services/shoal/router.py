"""How a grant finds its prefill replica: Serve's two random choices, but never one that has failed this prompt.

Serve copies this module's code into the processes that route: it must hold no state.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from shoal import routes
from shoal.messages import Grant

PATH = "shoal.router.GrantRouter"


class GrantRouter(RequestRouter):
    """Runs in each process that holds a handle to the prefill deployment, that is in the decode replicas.

    Of the two replicas chosen, Serve takes the one with the shorter queue. It tells nobody but its router which.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        grant = _grant_of(pending_request)
        # If all have failed it, one of them is still better than none.
        left = _without(candidate_replicas, grant.excluded) if grant is not None else candidate_replicas
        chosen = left or candidate_replicas
        return [random.sample(chosen, min(2, len(chosen)))] if chosen else []

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        grant = _grant_of(pending_request)
        if grant is not None:
            routes.note(grant, replica_id.unique_id)


def _grant_of(pending: PendingRequest | None) -> Grant | None:
    argument = pending.args[0] if pending is not None and pending.args else None
    return argument if isinstance(argument, Grant) else None


def _without(replicas: Iterable[RunningReplica], excluded: frozenset[str]) -> list[RunningReplica]:
    return [replica for replica in replicas if replica.replica_id.unique_id not in excluded]
