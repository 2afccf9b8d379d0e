"""Two pools whose models differ by little refuse each other, and say that it is the models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_clock import FakeClock
from models import save_tiny

from shoal.config import load_config
from shoal.engine.build import Served
from shoal.errors import PlanMismatch
from shoal.handoff.channels.memory import memory_pair
from shoal.handoff.prefill_side import PrefillSession
from shoal.handoff.session import PROTOCOL_VERSION, Identity
from shoal.model.files import locate
from shoal.wire.handoff_messages import Envelope, Hello


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(path, dtype=torch.float32, layers=2, hidden=256)
    edit(path / "tokenizer.json", set_merges(["a", "b"], ["b", "c"]))
    return path


def edit(path: Path, change: Callable[[Any], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def set_merges(*merges: list[str]) -> Callable[[Any], object]:
    return lambda tree: tree["model"].update(merges=merges)


def flip_a_byte(folder: Path) -> None:
    [file] = locate(str(folder)).tensor_files
    largest = max(file.tensors.values(), key=lambda info: info.num_bytes)
    assert largest.num_bytes > 3 * (64 << 10), "its middle is beyond what is near either end"
    with file.path.open("r+b") as opened:
        opened.seek(largest.offset + largest.num_bytes // 2)
        [byte] = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))


DIFFERENCES: dict[str, Callable[[Path], None]] = {
    "one byte amid a tensor": flip_a_byte,
    "one merge": lambda folder: edit(folder / "tokenizer.json", set_merges(["a", "b"], ["c", "b"])),
    "what ends an answer": lambda folder: edit(
        folder / "generation_config.json", lambda tree: tree.update(eos_token_id=5)
    ),
    "an added token": lambda folder: edit(folder / "tokenizer_config.json", lambda tree: tree.update(pad_token="a")),
}


async def greet(ours: str, theirs: str) -> PrefillSession:
    prefill, decode = memory_pair()
    identity = Identity(5, (ours,), peer="prefill")
    await decode.send(Envelope(7, Hello(PROTOCOL_VERSION, (theirs,), peer="decode")))
    return await PrefillSession.open(prefill, identity, ttl_s=5.0, max_frame_bytes=1024, clock=FakeClock())


@pytest.mark.parametrize("difference", DIFFERENCES)
async def test_models_that_differ_by_little_refuse_each_other_by_name(
    folder: Path, tmp_path: Path, difference: str
) -> None:
    shutil.copytree(folder, tmp_path / "other")
    DIFFERENCES[difference](tmp_path / "other")
    ours, theirs = (plan_hash(path) for path in (folder, tmp_path / "other"))
    with pytest.raises(PlanMismatch, match="the models differ"):
        await greet(ours, theirs)


async def test_plans_of_one_model_that_differ_are_told_from_models(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    ours, theirs = plan_hash(folder, skip_layers=1), plan_hash(tmp_path / "other", skip_layers=0)
    with pytest.raises(PlanMismatch, match="the plans differ"):
        await greet(ours, theirs)


async def test_copies_of_one_model_pair(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    session = await greet(plan_hash(folder), plan_hash(tmp_path / "other"))
    await session.close()


def plan_hash(folder: Path, **model: Any) -> str:
    return Served.of(load_config(model={"name": str(folder)} | model)).plan_hash
