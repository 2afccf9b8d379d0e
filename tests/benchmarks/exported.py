"""SmolLM2 in the two shapes that servers read: the packaged GGUF, and the same weights as a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shoal.engine.build import Served


@dataclass(frozen=True, slots=True)
class Model:
    """``folder`` has in bfloat16 what ``gguf`` has packed: the same values."""

    folder: Path
    gguf: Path
    max_context_tokens: int


def export(served: Served, folder: Path) -> Model:
    """Write the folder, for peers that read no GGUF."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from models import smollm2_reference

    disable_progress_bar()
    smollm2_reference(torch.bfloat16, "sdpa").save_pretrained(folder)
    served.files.tokenizer().save_pretrained(folder)
    return Model(folder, served.files.path, served.max_context_tokens)
