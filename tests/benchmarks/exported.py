"""SmolLM2 in the shapes that servers read: the packaged GGUF, the same weights as a folder, and both in int8."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from shoal.engine.build import Served

_WEIGHTS = "model.safetensors"
_LARGEST = 127


@dataclass(frozen=True, slots=True)
class Model:
    """``folder`` has in bfloat16 what ``gguf`` has packed: the same values.

    ``int8_folder`` has its layers' matrices in int8, with one scale an output, and says that inputs are to be rounded
    to int8, too, with one scale a row (compressed-tensors, "W8A8"). ``int8_gguf`` has all matrices as Q8_0: int8 with a
    scale for each 32 numbers.
    """

    folder: Path
    gguf: Path
    int8_folder: Path
    int8_gguf: Path
    max_context_tokens: int


def export(served: Served, scratch: Path) -> Model:
    """Write into ``scratch`` what isn't there as a file, for peers that read nothing else."""
    from models import smollm2_reference
    from transformers.utils.logging import disable_progress_bar

    folder, int8_folder, int8_gguf = scratch / "model", scratch / "model-int8", scratch / "model-int8.gguf"
    disable_progress_bar()
    smollm2_reference(torch.bfloat16, "sdpa").save_pretrained(folder)
    served.files.tokenizer().save_pretrained(folder)
    _write_int8_folder(folder, int8_folder)
    _write_int8_gguf(served.files.path, int8_gguf)
    return Model(folder, served.files.path, int8_folder, int8_gguf, served.max_context_tokens)


def _write_int8_folder(source: Path, target: Path) -> None:
    """The head is the embedding's, and stays as it is: what the format's readers ask of tied ones."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(_WEIGHTS))
    tensors = {}
    for name, tensor in load_file(source / _WEIGHTS).items():
        if name.endswith("_proj.weight"):
            scale = tensor.float().abs().amax(dim=1, keepdim=True) / _LARGEST
            tensors[f"{name}_scale"] = scale
            tensors[name] = (tensor.float() / scale).round().to(torch.int8)
        else:
            tensors[name] = tensor
    save_file(tensors, target / _WEIGHTS, metadata={"format": "pt"})
    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _bytes(strategy="channel", dynamic=False),
                "input_activations": _bytes(strategy="token", dynamic=True),
            }
        },
    }
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _bytes(**how: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, **how}


def _write_int8_gguf(source: Path, target: Path) -> None:
    reader = GGUFReader(source)
    fields = reader.fields.values()
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in fields:
        if field.name == "general.file_type":
            writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
        elif not field.name.startswith("GGUF.") and field.name != "general.architecture":
            is_array = field.types[0] is GGUFValueType.ARRAY
            writer.add_key_value(
                field.name, field.contents(), field.types[0], sub_type=field.types[-1] if is_array else None
            )
    for tensor in reader.tensors:
        if tensor.tensor_type is GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            packed = quantize(dequantize(tensor.data, tensor.tensor_type), GGMLQuantizationType.Q8_0)
            writer.add_tensor(tensor.name, packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
