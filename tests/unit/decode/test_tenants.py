"""Two tenants who ask the same: neither learns from what they get, or from how much work it is, of the other."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny

from shoal.cluster.local import LocalShoal, open_local
from shoal.config import load_config
from shoal.decode.prefill_pool import PrefillPool
from shoal.wire.handoff_messages import Grant, HandoffOutcome
from shoal.wire.messages import Depth, GenerateRequest, HandoffReport, RequestContext, SamplingParams

PROMPT = tuple(3 + index * 7 % 90 for index in range(140))


class Watched:
    """A prefill pool, and what it was asked."""

    def __init__(self, pool: PrefillPool) -> None:
        self._pool = pool
        self.grants: list[Grant] = []

    @property
    def unfit(self) -> frozenset[str]:
        return self._pool.unfit

    async def living(self, *, now: bool = False) -> frozenset[str]:
        return await self._pool.living(now=now)

    async def ask(self, grant: Grant) -> HandoffOutcome:
        self.grants.append(grant)
        return await self._pool.ask(grant)

    def asked(self, grant: Grant) -> str | None:
        return self._pool.asked(grant)


async def ask(local: LocalShoal, tenant: str) -> tuple[list[int], HandoffReport]:
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    request = GenerateRequest(RequestContext("test", 30, tenant=tenant), "tiny", PROMPT, Depth.SHALLOW, params)
    outputs = [output async for output in local.decode.worker.generate(request)]
    await asyncio.wait_for(local.decode.desk.idle.wait(), 5)
    assert outputs[0].handoff is not None
    return [token for output in outputs for token in output.token_ids], outputs[0].handoff


@pytest.mark.parametrize("reuse", ["exact", "any"])
async def test_a_tenant_learns_nothing_of_another_by_cache_hash_or_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reuse: str
):
    save_tiny(tmp_path, dtype=torch.float32, layers=6)
    stage = {"num_blocks": 128, "block_tokens": 4, "max_step_tokens": 32, "num_threads": 1}
    config = load_config(
        model={"name": str(tmp_path), "skip_layers": 3, "dtype": "float32"},
        prefill=stage | {"reuse": "exact"},
        decode=stage | {"reuse": reuse},
        handoff={"local_tokens": 0},
    )
    drawn: list[bytes] = []

    def token_bytes(number: int | None = None) -> bytes:
        drawn.append(real(number))
        return drawn[-1]

    real = secrets.token_bytes
    monkeypatch.setattr(secrets, "token_bytes", token_bytes)
    async with open_local(config) as local:
        worker: Any = local.decode.worker
        worker.prefill = watched = Watched(worker.prefill)
        cold_answer, cold = await ask(local, "alice")
        _, warm = await ask(local, "alice")
        answer, report = await ask(local, "bob")
    # By work: bob's is all of what alice's was at first, however much of it is there by now.
    assert answer == cold_answer
    assert report == cold and cold.num_cached_tokens == 0
    assert warm.num_cached_tokens > 100  # or there was nothing to be seen
    # By hash: the keys by which prompts find their replica have nothing in common.
    alices, bobs = (set(grant.prefix_keys) for grant in (watched.grants[0], watched.grants[-1]))
    assert len(alices) == len(bobs) == 2 and not alices & bobs
    # By lease: 128 bits each, from the system's own source, and no two alike.
    leases = [grant.lease_id for grant in watched.grants]
    assert len(set(leases)) == len(leases) and all(len(lease) == 16 and lease in drawn for lease in leases)
