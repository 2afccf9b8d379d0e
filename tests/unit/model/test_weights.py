"""Tensors come out of each format as transformers has them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Quant
from gguf import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import save_tiny, save_tiny_gguf, smollm2_reference, tiny_llama
from safetensors.torch import save_file

from shoal.errors import MalformedWeights, ModelError, UnsupportedModel
from shoal.model.files import ModelFiles, locate
from shoal.model.weights import open_weights

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def read_all(files: ModelFiles) -> dict[str, torch.Tensor]:
    with open_weights(files) as reader:
        return {name: reader.read(name) for name in reader.names}


def assert_holds(files: ModelFiles, expected: dict[str, torch.Tensor]) -> None:
    found = read_all(files)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# --- safetensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_saved_folder_reads_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype):
    model = save_tiny(tmp_path, dtype=dtype, layers=2, attention_bias=True)
    assert_holds(locate(str(tmp_path)), model.state_dict())


def test_a_sharded_folder_reads_back_bit_for_bit(tmp_path: Path):
    model = save_tiny(tmp_path, layers=3, max_shard_bytes=100_000)
    files = locate(str(tmp_path))
    assert len(files.tensor_files) > 2
    assert_holds(files, model.state_dict())


def test_a_missing_tensor_is_named(tmp_path: Path):
    save_tiny(tmp_path, layers=1)
    with open_weights(locate(str(tmp_path))) as reader:
        for ask in (reader.read, reader.shape, reader.num_bytes):
            with pytest.raises(MalformedWeights, match=r"model\.layers\.1\.mlp"):
                ask("model.layers.1.mlp.up_proj.weight")


def test_integers_are_no_weights(tmp_path: Path):
    save_tiny(tmp_path, layers=1)
    save_file({Q_PROJ: torch.zeros(8, 8, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with open_weights(locate(str(tmp_path))) as reader, pytest.raises(MalformedWeights, match=f"{Q_PROJ}.*I8"):
        reader.read(Q_PROJ)


def test_a_file_that_shrinks_under_the_reader_is_an_error(tmp_path: Path):
    save_tiny(tmp_path, layers=1)
    with open_weights(locate(str(tmp_path))) as reader:
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(MalformedWeights, match=Q_PROJ):
            reader.read(Q_PROJ)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda index: index["weight_map"].update({Q_PROJ: "../model.safetensors"}), r"\.\./model"),
        (lambda index: index["weight_map"].update({Q_PROJ: "elsewhere.safetensors"}), "elsewhere"),
        (lambda index: index["weight_map"].update({"one.more": index["weight_map"][Q_PROJ]}), r"one\.more"),
        (lambda index: index["weight_map"].update({Q_PROJ: 3}), "weight_map"),
        (lambda index: index.pop("weight_map"), "weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, edit: Any, message: str):
    save_tiny(tmp_path, layers=2, max_shard_bytes=100_000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    with pytest.raises(MalformedWeights, match=message):
        read_all(locate(str(tmp_path)))


# --- GGUF ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tie": True}, {"attention_bias": True, "mlp_bias": True}, {"kv_heads": 1}])
def test_a_gguf_gives_transformers_names_and_row_order(tmp_path: Path, options: dict[str, Any]):
    model = tiny_llama(torch.float32, layers=2, **options)[1]
    save_tiny_gguf(tmp_path / "tiny.gguf", model)
    expected = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert_holds(locate(str(tmp_path / "tiny.gguf")), expected)


@pytest.mark.parametrize("kind", [Quant.F16, Quant.BF16, Quant.Q4_0, Quant.Q4_1, Quant.Q5_0, Quant.Q5_1, Quant.Q8_0])
def test_each_quantization_is_the_gguf_packages_own(tmp_path: Path, kind: Quant):
    model = tiny_llama(torch.float32, layers=1)[1]
    save_tiny_gguf(tmp_path / "tiny.gguf", model, kind)
    found = read_all(locate(str(tmp_path / "tiny.gguf")))
    for name, tensor in model.state_dict().items():
        expected = tensor
        if tensor.dim() == 2:  # a quantization block lies in one row, so the order of rows doesn't matter
            expected = torch.from_numpy(dequantize(quantize(tensor.numpy(), kind), kind))
        assert torch.equal(found[name], expected), name


def test_a_tensor_that_no_llama_has_is_refused(tmp_path: Path):
    model = tiny_llama(torch.float32, layers=1)[1]
    model.model.layers[0].self_attn.register_parameter("q_norm", torch.nn.Parameter(torch.ones(16)))
    save_tiny_gguf(tmp_path / "tiny.gguf", model)
    with pytest.raises(UnsupportedModel, match="q_norm"), open_weights(locate(str(tmp_path / "tiny.gguf"))):
        pass


@pytest.mark.parametrize("kind", [Quant.Q8_K, Quant.Q8_1])
def test_a_quantization_that_cannot_be_read_names_its_tensor(tmp_path: Path, kind: Quant):
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path, tiny_llama(torch.float32, layers=1, hidden=256, intermediate=256)[1], Quant.Q4_0)
    path.write_bytes(with_type(path.read_bytes(), "blk.0.ffn_up.weight", kind) + bytes(1 << 20))
    message = rf"mlp\.up_proj\.weight.*{kind.name}"
    with open_weights(locate(str(path))) as reader, pytest.raises(MalformedWeights, match=message):
        reader.read("model.layers.0.mlp.up_proj.weight")


def with_type(data: bytes, name: str, kind: int) -> bytes:
    """A GGUF with another type number for the matrix ``name``: name, uint32 2, two uint64, then the type."""
    at = data.index(name.encode()) + len(name) + 4 + 16
    return data[:at] + int(kind).to_bytes(4, "little") + data[at + 4 :]


# --- damage ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model in both formats."""
    folder = tmp_path_factory.mktemp("small")
    model = save_tiny(folder, dtype=torch.float32, layers=1, hidden=32, heads=2, kv_heads=1, intermediate=32)
    save_tiny_gguf(folder / "tiny.gguf", model)
    return {"gguf": folder / "tiny.gguf", "safetensors": folder / "model.safetensors"}


def use(path: Path, data: bytes) -> None:
    """Everything that a replica does with the files, on ``data`` in place of the weight file at ``path``."""
    original = path.read_bytes()
    try:
        path.write_bytes(data)
        files = locate(str(path if path.suffix == ".gguf" else path.parent))
        files.config()
        assert len(files.digest) == 64
        files.eos_token_ids()
        read_all(files)
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_every_truncation_is_malformed(small: dict[str, Path], kind: str):
    data = small[kind].read_bytes()
    for length in {*range(64), *range(64, len(data), 997), len(data) - 1}:
        with pytest.raises(MalformedWeights):
            use(small[kind], data[:length])


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_header_loads_or_is_a_model_error(
    small: dict[str, Path], kind: str, where: float, bit: int
):
    data = bytearray(small[kind].read_bytes())
    files = locate(str(small[kind] if kind == "gguf" else small[kind].parent))
    data[int(where * files.tensor_files[0].data_start)] ^= 1 << bit
    with contextlib.suppress(ModelError):
        use(small[kind], bytes(data))


@pytest.mark.parametrize("number", [2**64 - 1, 2**63, 2**40])
@pytest.mark.parametrize("at", [8, 16, 24])
def test_absurd_counts_in_a_gguf_are_malformed_at_once(small: dict[str, Path], number: int, at: int):
    """Number of tensors, of values, and the length of the first key."""
    data = bytearray(small["gguf"].read_bytes())
    data[at : at + 8] = number.to_bytes(8, "little")
    with pytest.raises(MalformedWeights):
        use(small["gguf"], bytes(data))


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"3", b"null", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 3}', b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [100, 108]}}',
    ],
)  # fmt: skip
def test_headers_that_are_json_but_no_tensors_are_malformed(small: dict[str, Path], header: bytes):
    with pytest.raises(MalformedWeights):
        use(small["safetensors"], len(header).to_bytes(8, "little") + header + bytes(8))


# --- the real model --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_equals_what_transformers_loads_bit_for_bit():
    from transformers import AutoModelForCausalLM

    files = locate("smollm2")
    theirs = AutoModelForCausalLM.from_pretrained(
        files.path.parent, gguf_file=files.path.name, dtype=torch.float32, trust_remote_code=False
    )
    ours = smollm2_reference(torch.float32)
    expected = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == expected.keys()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    mine, reference = ours.config.to_dict(), theirs.config.to_dict()
    facts = set(mine) - {"_name_or_path", "architectures", "dtype"}
    assert {key: mine[key] for key in facts} == {key: reference[key] for key in facts}
