"""The plots in docs/figures show what the figures beside them hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[4]
FIGURES = ROOT / "docs" / "figures"


def test_shoal_beside_its_peers():
    speed = json.loads((FIGURES / "compare-zen4.json").read_text(encoding="utf-8"))["speed_over_baseline"]
    bars = {arm: [f"{times:.2f}" for times in speed[arm].values()] for arm in speed}
    peers = (bars["transformers"], bars["llama.cpp"])
    drawn = re.findall(r">(\d\.\d\d)<", (FIGURES / "peers.svg").read_text(encoding="utf-8"))
    assert drawn == [*bars["shoal-shallow"], *bars["vllm"], *peers[0], *peers[1]]
    [told] = re.findall(r"!\[([^\]]+)\]\(docs/figures/peers\.svg\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert re.findall(r"\d\.\d\d", told) == [*bars["shoal-shallow"], *peers[0], *peers[1]]
