"""Headers of weights that were damaged, or made to harm: an error that names the file, soon and with little memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import examples
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from models import save_tiny, save_tiny_gguf

from shoal.errors import MalformedWeights, ModelError
from shoal.model.gguf_header import read_gguf
from shoal.model.safetensors_header import read_safetensors
from shoal.model.tensor_file import TensorFile

READERS: dict[str, Callable[[Path], TensorFile]] = {"gguf": read_gguf, "safetensors": read_safetensors}
NUMBERS = st.sampled_from([0, 1, 2, 8, 9, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A tiny model's header in both formats, with what is left of its tensors."""
    folder = tmp_path_factory.mktemp("whole")
    model = save_tiny(folder, dtype=torch.float32, layers=1, hidden=32, heads=2, kv_heads=1, intermediate=32)
    save_tiny_gguf(folder / "tiny.gguf", model)
    return {"gguf": (folder / "tiny.gguf").read_bytes(), "safetensors": (folder / "model.safetensors").read_bytes()}


def read(kind: str, folder: Path, data: bytes) -> TensorFile | None:
    """None for one of the named errors; fails if it takes far more memory than the file is long."""
    path = folder / f"weights.{kind}"
    path.write_bytes(data)
    found, message = None, str(path)
    tracemalloc.start()
    try:
        found = READERS[kind](path)
    except ModelError as error:
        message = error.message
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100 * len(data) + (1 << 20)
    assert str(path) in message
    return found


@pytest.mark.parametrize("kind", READERS)
def test_a_header_as_it_was_is_read(whole: dict[str, bytes], kind: str, tmp_path: Path) -> None:
    found = read(kind, tmp_path, whole[kind])
    assert found is not None and found.tensors


@pytest.mark.parametrize("kind", READERS)
@examples(120, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_header_is_read_or_refused(
    whole: dict[str, bytes], kind: str, tmp_path: Path, data: st.DataObject
) -> None:
    """Bytes changed, numbers put in, pieces left out, doubled, and moved."""
    found = bytearray(whole[kind])
    end = READERS[kind](save(tmp_path, kind, found)).data_start
    for _ in range(data.draw(st.integers(1, 4))):
        place, length = data.draw(st.integers(0, max(0, min(end, len(found)) - 1))), data.draw(st.integers(1, 40))
        match data.draw(st.sampled_from(["bytes", "number", "cut", "double", "end"])):
            case "bytes":
                found[place : place + length] = data.draw(st.binary(min_size=length, max_size=length))
            case "number":
                found[place : place + 8] = data.draw(NUMBERS).to_bytes(8, "little")
            case "cut":
                del found[place : place + length]
            case "double":
                found[place:place] = found[place : place + length]
            case "end":
                del found[place:]
    tensors = read(kind, tmp_path, bytes(found))
    for info in () if tensors is None else tensors.tensors.values():
        assert info.offset >= 0 and info.offset + info.num_bytes <= len(found)


counts = st.integers(-2, 40) | NUMBERS | st.floats() | st.none() | st.text(max_size=3)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "", 3, None]),
        "shape": st.lists(counts, max_size=12) | counts,
        "data_offsets": st.lists(counts, min_size=2, max_size=2) | st.lists(counts, max_size=3) | counts,
    },
)


@examples(150, suppress_health_check=list(HealthCheck))
@given(header=st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), entries | counts, max_size=4))
def test_any_json_in_a_safetensors_header_is_read_or_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    tensors = read("safetensors", tmp_path, len(text).to_bytes(8, "little") + text + bytes(64))
    for info in () if tensors is None else tensors.tensors.values():
        assert all(type(size) is int and size >= 0 for size in info.shape)


def test_a_shape_of_a_million_dimensions_is_refused_at_once(tmp_path: Path) -> None:
    """Their product has eight million digits, and takes an hour."""
    shape = ",".join(["9223372036854775807"] * 1_000_000)
    text = f'{{"a": {{"dtype": "F32", "shape": [{shape}], "data_offsets": [0, 4]}}}}'.encode()
    path = save(tmp_path, "safetensors", len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(MalformedWeights, match="dimensions"):
        read_safetensors(path)


def save(folder: Path, kind: str, data: bytes) -> Path:
    path = folder / f"weights.{kind}"
    path.write_bytes(data)
    return path
