"""Of replicas that share cores one gets all that it has room for, and when it dies the other one goes on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from clusters import Look, cluster
from models import save_tiny

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

# Long enough to be handed over, and of answers that take a tiny model seconds.
SOME = {str(start): [3 + (start + index * index) % 90 for index in range(300)] for start in range(6)}
NUM_TOKENS = 400
NUM_TO_SEE = len(SOME) * 8


@pytest.mark.long
def test_the_replica_that_has_all_answers_dies_and_the_other_one_finishes_them(tmp_path: Path):
    save_tiny(tmp_path, dtype=torch.float32, context=2048)
    model = {"name": str(tmp_path), "served_name": "smollm2", "skip_layers": 2}
    with cluster(model=model, decode={"replicas": 2}, prefill={"replicas": 2}) as live:
        right = live.complete(SOME, max_tokens=NUM_TOKENS, depth="shallow")
        assert len(set(map(tuple, right.values()))) == len(SOME)
        before = live.look()
        assert len(at_work(before)) == 1 and live.num_transfers == len(SOME), (
            "the other decode replica has computed something, too"
        )
        num_before = before.metric("shoal_decode_tokens_total")
        with ThreadPoolExecutor(1) as thread:
            answers = thread.submit(live.complete, SOME, max_tokens=NUM_TOKENS, depth="shallow")
            while (look := live.look()).metric("shoal_decode_tokens_total") < num_before + NUM_TO_SEE:
                assert not answers.done(), "answered before anything could happen to it"
            [busy] = at_work(look)
            assert not answers.done(), "answered before anything could happen to it"
            live.kill(busy)
            told = answers.result()
        assert told == right
        live.await_whole()
        after = live.look()
        assert after.metric("shoal_requests_total", status="200") == 2 * len(SOME)
        assert after.metric("shoal_retries_total", reason="peer_gone") >= 1


def at_work(look: Look) -> list[str]:
    """The decode replicas that have generated something."""
    return [replica for replica, num in look.each("shoal_decode_tokens_total", role="decode").items() if num]
