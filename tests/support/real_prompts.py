"""Twenty real prompts, what the references say to them, and how answers are compared token for token.

    python tests/support/real_prompts.py    # computes the references anew: a few minutes of all cores

The references are kept in references.json, since computing them takes longer than the tests that want them. They hold
only for what they were made of, reference.py and the prompts' texts; test_kept_references.py computes some anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import reference
import torch
from models import smollm2_reference
from reference import Generated, full_generate, pop_generate
from rich.progress import track
from texts import prompts

from shoal.model.files import locate

NUM_TOKENS = 64
NUM_SKIPPED = 10
KEPT = Path(__file__).parent / "references.json"
# A first difference is excused only where the reference itself was undecided.
MAX_EXCUSED_GAP = 1e-4
# Every difference that was, with its test: conftest.py lists them at the end of the run.
EXCUSED: list[str] = []


@dataclass(frozen=True)
class RealPrompt:
    """A prompt's ids, and 64 greedy tokens in float32: transformers' own, and the paper's at ten skipped layers."""

    name: str
    token_ids: tuple[int, ...]
    full: Generated
    shallow: Generated


@functools.cache
def real_prompts() -> tuple[RealPrompt, ...]:
    """All twenty with their references, as they are kept."""
    return tuple(_read(tree) for tree in json.loads(KEPT.read_text(encoding="utf-8"))["prompts"])


def refer(name: str, num_tokens: int = NUM_TOKENS) -> RealPrompt:
    """One prompt with its references, computed anew: seconds."""
    model = smollm2_reference()
    ids = tuple(locate("smollm2").tokenizer().encode(prompts()[name]))
    return RealPrompt(
        name, ids, full_generate(model, ids, num_tokens), pop_generate(model, ids, num_tokens, NUM_SKIPPED)
    )


def made_of() -> str:
    """A hash of all that the references depend on, but for the weights, whose package has one version."""
    parts = [
        Path(reference.__file__).read_text(encoding="utf-8"),
        *(f"{NUM_TOKENS} {NUM_SKIPPED}", *prompts().values()),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read(tree: dict[str, Any]) -> RealPrompt:
    full, shallow = (Generated(tuple(tree[depth]["token_ids"]), tuple(tree[depth]["gaps"])) for depth in _DEPTHS)
    return RealPrompt(tree["name"], tuple(tree["token_ids"]), full, shallow)


_DEPTHS = ("full", "shallow")


def _tree(prompt: RealPrompt) -> dict[str, Any]:
    tree = asdict(prompt)
    for depth in _DEPTHS:
        tree[depth]["gaps"] = [float(f"{gap:.4g}") for gap in tree[depth]["gaps"]]
    return tree


def ids_of(known: Mapping[str, RealPrompt]) -> dict[str, tuple[int, ...]]:
    return {name: prompt.token_ids for name, prompt in known.items()}


def references(known: Mapping[str, RealPrompt], depth: str) -> dict[str, Generated]:
    """What each prompt's answer must be at ``depth`` (shallow or full)."""
    return {name: getattr(prompt, depth) for name, prompt in known.items()}


def assert_same_tokens(answers: Mapping[str, Sequence[int]], references: Mapping[str, Generated]) -> list[str]:
    """Every answer equals its reference, or first differs where the reference's two best logits were closer than
    ``MAX_EXCUSED_GAP``. Returns what was excused; the end of the run lists it, too."""
    assert answers.keys() == references.keys()
    excused, wrong = [], []
    for name, expected in references.items():
        ours, theirs = list(answers[name]), list(expected.token_ids)
        assert len(ours) == len(theirs), f"{name}: {len(ours)} tokens for {len(theirs)}"
        first = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
        if first is not None:
            line = f"{name}: token {first} is {ours[first]}, not {theirs[first]} (gap {expected.gaps[first]:.2e})"
            (excused if expected.gaps[first] < MAX_EXCUSED_GAP else wrong).append(line)
    assert not wrong, "\n".join(wrong)
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    EXCUSED.extend(f"{test} {line}" for line in excused)
    return excused


def main() -> None:
    """One process a core, of one thread each: token by token, a second thread wins nothing."""
    names = sorted(prompts(), key=lambda name: -len(prompts()[name]))  # so that no core ends with a long one alone
    with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as workers:
        found = list(track(workers.map(refer, names), "computing references", total=len(names)))
    trees = [_tree(prompt) for prompt in sorted(found, key=lambda prompt: prompt.name)]
    lines = ",\n".join(json.dumps(tree) for tree in trees)
    KEPT.write_text(f'{{"made_of": "{made_of()}", "prompts": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
