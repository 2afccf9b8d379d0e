from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engines import native_kernels
from hypothesis import given
from hypothesis import strategies as st

from shoal.backends.cpu.copying import Copier
from shoal.errors import InternalError
from shoal.handoff.base import crc32c
from shoal.handoff.carriers.shm import FOLDER, ShmLoader, ShmUnloader, reap
from shoal.handoff.frames import Piece
from shoal.model.kv_rows import KvRows
from shoal.wire.handoff_messages import Chunk

SLOT_BYTES = 1000
LEASE = bytes(16)


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="shoal-test-", dir=FOLDER))
    yield made
    shutil.rmtree(made)


def make(folder: Path, num_slots: int = 4) -> ShmLoader:
    return ShmLoader.create(SLOT_BYTES, (1 + num_slots) * mmap.PAGESIZE, folder)


def joined(folder: Path, num_slots: int = 4) -> tuple[ShmLoader, ShmUnloader]:
    loader = make(folder, num_slots)
    unloader = ShmUnloader.attach(loader.segment, folder)
    assert unloader is not None
    loader.hide()
    return loader, unloader


def piece(seq: int, payload: bytes, lease_id: bytes = LEASE) -> Piece:
    return Piece(lease_id, seq, 0, 1, 0, 1, memoryview(payload))


def staged(loader: ShmLoader, seq: int, payload: bytes, lease_id: bytes = LEASE) -> Chunk:
    loaded = loader.load(piece(seq, payload, lease_id))
    assert loaded.staged is not None and loaded.payload == b""
    assert loaded.num_bytes == len(payload)
    return loaded


def unload(unloader: ShmUnloader, one: Chunk) -> Chunk:
    copies: list[Chunk] = []
    assert one.staged is not None
    unloader.unload(one, one.staged, copies.append)
    return copies.pop()  # at once


@pytest.mark.parametrize("has_kernel", [True, False])
def test_rows_of_a_pool_are_gathered_into_the_slot(folder: Path, has_kernel: bool) -> None:
    copier = Copier(native_kernels() if has_kernel else None)
    loader = ShmLoader.create(SLOT_BYTES, 5 * mmap.PAGESIZE, folder, copier)
    unloader = ShmUnloader.attach(loader.segment, folder)
    pool = tuple(np.random.default_rng(0).integers(0, 256, (3, 9, 64), dtype=np.uint8))
    rows = KvRows(pool, np.array([7, 2, 5]))
    loaded = loader.load(Piece(LEASE, 0, 0, 3, 0, 3, rows))
    assert unloader is not None and loaded.num_bytes == len(rows) == 3 * 3 * 64
    expected = b"".join(layer[[7, 2, 5]].tobytes() for layer in pool)
    assert unload(unloader, loaded).payload == expected and loaded.crc32c == crc32c(expected)
    loader.close()


# --- the segment ----------------------------------------------------------------------------------------


def test_a_segment_is_private_and_its_name_says_nothing(folder: Path) -> None:
    first, second = make(folder), make(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {first.segment.name, second.segment.name}
    assert len(first.segment.name) == len("shoal-") + 32
    assert first.segment.nonce != second.segment.nonce
    assert stat.S_IMODE((folder / first.segment.name).stat().st_mode) == 0o600
    for loader in (first, second):
        loader.close()
        loader.close()
    assert not list(folder.iterdir())


def test_a_segment_takes_no_more_than_it_may_and_half_of_what_is_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = os.statvfs(folder)
    small = os.statvfs_result((room.f_bsize, 4096, 100, 16, 16, 100, 100, 100, room.f_flag, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    loader = ShmLoader.create(SLOT_BYTES, 1 << 20, folder)
    assert loader.segment.num_slots == 16 // 2 - 1  # its head takes a page, too
    assert (folder / loader.segment.name).stat().st_size == 8 * 4096
    loader.close()
    tiny = os.statvfs_result((room.f_bsize, 4096, 100, 2, 2, 100, 100, 100, room.f_flag, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: tiny)
    with pytest.raises(OSError, match="no room"):
        ShmLoader.create(SLOT_BYTES, 1 << 20, folder)


def test_what_cannot_be_allocated_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        make(folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"name": "shoal-" + "0" * 32},
        {"name": "../passwd"},
        {"name": "/etc/passwd"},
        {"name": ""},
        {"name": "shoal-\0"},
        {"num_slots": 5},
        {"num_slots": 3},
        {"slot_bytes": 5000},
        {"nonce": bytes(16)},
    ],
    ids=str,
)
def test_a_segment_that_is_not_the_announced_one_is_not_mapped(folder: Path, change: dict[str, object]) -> None:
    loader = make(folder)
    assert ShmUnloader.attach(replace(loader.segment, **change), folder) is None  # type: ignore[arg-type]
    loader.close()


def test_a_file_that_others_may_write_or_a_link_is_not_mapped(folder: Path) -> None:
    loader = make(folder)
    path = folder / loader.segment.name
    path.chmod(0o620)
    assert ShmUnloader.attach(loader.segment, folder) is None
    path.chmod(0o600)
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    assert ShmUnloader.attach(loader.segment, folder) is None
    path.unlink()
    os.mkfifo(path, 0o600)
    assert ShmUnloader.attach(loader.segment, folder) is None
    loader.close()


def test_decode_cannot_write(folder: Path) -> None:
    loader, unloader = joined(folder)
    with pytest.raises(TypeError):
        unloader._memory[0] = 1
    loader.close()
    unloader.close()


# --- slots ----------------------------------------------------------------------------------------------


def test_a_payload_is_the_slot_itself_for_as_long_as_it_is_there(folder: Path) -> None:
    loader, unloader = joined(folder)
    one = staged(loader, 0, b"x" * SLOT_BYTES)
    assert one.staged is not None
    arrived = unload(unloader, one)
    assert arrived == replace(one, payload=b"x" * SLOT_BYTES)
    assert arrived.crc32c == crc32c(arrived.payload)
    assert unloader.is_there(one.staged)
    loader.credited(LEASE, 0)
    staged(loader, 1, b"y" * 10)
    assert arrived.payload[:11] == b"y" * 10 + b"x"
    assert not unloader.is_there(one.staged)
    unloader.close()
    loader.close()


def test_a_session_that_is_over_leaves_the_slot_to_the_copy_under_way(folder: Path) -> None:
    loader, unloader = joined(folder)
    one = staged(loader, 0, b"x" * SLOT_BYTES)
    assert one.staged is not None
    payload = unload(unloader, one).payload
    memory = weakref.ref(unloader._memory)
    unloader.close()
    unloader.close()
    loader.close()
    assert payload == b"x" * SLOT_BYTES
    assert not unloader.is_there(one.staged)
    del payload
    assert memory() is None


def test_a_slot_is_lent_again_only_after_its_credit_or_the_end_of_its_lease(folder: Path) -> None:
    loader, unloader = joined(folder, num_slots=2)
    first, second = (staged(loader, seq, b"x") for seq in range(2))
    assert not loader.has_room
    loader.credited(LEASE, 7)
    loader.credited(bytes(15) + b"1", 0)
    loader.ended(bytes(15) + b"1")
    assert not loader.has_room
    for _ in range(2):
        loader.credited(LEASE, 0)
    third = staged(loader, 2, b"z")
    assert third.staged == replace(first.staged, generation=2)  # type: ignore[type-var]
    assert not loader.has_room
    assert unload(unloader, first).payload == b""  # another generation
    assert unload(unloader, second).payload == b"x"
    for _ in range(2):
        loader.ended(LEASE)
    assert loader.num_lent == 0
    unloader.close()
    loader.close()


def test_what_does_not_fit_is_a_defect_of_ours(folder: Path) -> None:
    loader = make(folder, num_slots=1)
    with pytest.raises(InternalError):
        loader.load(piece(0, bytes(SLOT_BYTES + 1)))
    loader.load(piece(0, b"x"))
    with pytest.raises(InternalError):
        loader.load(piece(1, b"x"))
    loader.close()


def test_a_segment_that_was_cut_gives_nothing_and_kills_nobody(folder: Path) -> None:
    loader = make(folder)
    unloader = ShmUnloader.attach(loader.segment, folder)
    assert unloader is not None
    last = [staged(loader, seq, b"x") for seq in range(4)][-1]
    os.truncate(folder / loader.segment.name, mmap.PAGESIZE)
    assert unload(unloader, last).payload == b""
    unloader.close()
    assert unload(unloader, last).payload == b""
    loader.close()


@given(st.lists(st.tuples(st.sampled_from(["load", "credit", "end"]), st.integers(0, 2)), max_size=60))
def test_no_slot_is_ever_lent_twice_and_each_payload_is_there_until_it_is_given_back(
    steps: list[tuple[str, int]],
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="shoal-test-", dir=FOLDER))
    loader, unloader = joined(folder, num_slots=3)
    shutil.rmtree(folder)
    out: dict[bytes, dict[int, tuple[Chunk, bytes]]] = {bytes([lease]) * 16: {} for lease in range(3)}
    old: list[tuple[Chunk, bytes]] = []
    for seq, (step, lease) in enumerate(steps):
        lease_id = bytes([lease]) * 16
        held = out[lease_id]
        match step:
            case "load":
                payload = seq.to_bytes(4, "big") * 9
                assert loader.has_room == (sum(map(len, out.values())) < 3)
                if loader.has_room:
                    held[seq] = loader.load(piece(seq, payload, lease_id)), payload
            case "credit" if held:
                first = next(iter(held))
                loader.credited(lease_id, first)
                old.append(held.pop(first))
            case "end":
                loader.ended(lease_id)
                old += held.values()
                held.clear()
        lent = [one for held in out.values() for one, _ in held.values()]
        assert len({one.staged.slot for one in lent}) == len(lent) == loader.num_lent  # type: ignore[union-attr]
        for one, payload in (pair for held in out.values() for pair in held.values()):
            assert unload(unloader, one).payload == payload
        for one, payload in old:
            assert unload(unloader, one).payload in (b"", payload)  # never another's
    unloader.close()
    loader.close()


# --- the dead -------------------------------------------------------------------------------------------


def test_segments_of_dead_owners_are_reaped_and_those_of_the_living_are_not(folder: Path) -> None:
    program = """
import sys
from pathlib import Path
from shoal.handoff.carriers.shm import ShmLoader
loader = ShmLoader.create(1000, 1 << 16, Path(sys.argv[1]))
print(loader.segment.name, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as child:
        assert child.stdout is not None
        orphan = folder / child.stdout.readline().strip()
        assert orphan.is_file()
        assert reap(folder) == 0
        child.send_signal(signal.SIGKILL)
    mine = make(folder)
    foreign = folder / "shoal-something"
    foreign.touch()
    assert reap(folder) == 1
    assert sorted(folder.iterdir()) == sorted([folder / mine.segment.name, foreign])
    mine.close()


@pytest.mark.parametrize("holds", [True, False], ids=["while it is looked at", "after it was taken"])
def test_a_segment_that_somebody_reaps_before_it_is_locked_is_made_once_more(
    folder: Path, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = fcntl.flock, list[str]()

    def lock_after_another(file: int, how: int) -> None:
        if not taken:
            taken.extend(path.name for path in folder.iterdir())
            monkeypatch.setattr(fcntl, "flock", lock)
            assert reap(folder) == 1
            if holds:
                raise BlockingIOError
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", lock_after_another)
    loader, unloader = joined(folder)
    assert taken and loader.segment.name not in taken
    unloader.close()
    loader.close()
    assert not list(folder.iterdir())
