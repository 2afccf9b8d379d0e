"""Facts that stand somewhere in a long prompt, one of which is asked for at its end.

::

    The code of Alice is 583.  filler …  The code of Hugo is 314.  filler …  The code of Maria is 940.
    What is the code of Hugo?                                            answer begun: The code of Hugo is → 314

A shallow prompt keeps its facts only in projected K/V, so this is where it is expected to lose most. Facts are spread
evenly, and the asked one's place is its depth: 0 is the prompt's beginning, 1 its end. The others are what a model
that remembers codes, but not whose, would say. Five facts of three digits are hard enough for a shallow prompt to lose
many, and easy enough for a model of 135M parameters to find most at full depth.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.errors import TooLittleText
from shoal_lab.quality.texts import opening

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LENGTHS = (175, 350, 700, 1400)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

_NAMES = (
    "Alice", "Bruno", "Carla", "Derek", "Elena", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Karen", "Louis", "Maria",
    "Nadia", "Oscar", "Paula", "Quinn", "Roger", "Sofia", "Tomas", "Ursula", "Victor", "Wendy", "Xavier", "Yvonne",
)  # fmt: skip
_NUM_FACTS, _CODES = 5, range(100, 1000)
_MAX_SENTENCE_TOKENS = 30


@dataclass(frozen=True, slots=True)
class RetrievalCase:
    """Token ids of a prompt and of the right answer. ``length`` and ``depth`` are its cell: the longest the prompt may
    be, in tokens, and where in it the asked fact stands."""

    length: int
    depth: float
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def is_right(self, output: Sequence[int]) -> bool:
        """Whether a greedy output (token ids) begins with the answer."""
        return tuple(output[: len(self.answer)]) == self.answer


def retrieval_cases(
    tokenizer: PreTrainedTokenizerFast,
    filler: str,
    *,
    seed: int = 0,
    num_cases_per_cell: int = 25,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
) -> list[RetrievalCase]:
    """Cases of every length with every depth; by default 500. The same arguments give the same cases.

    ``filler`` is what stands between the facts, cut into sentences. With a chat template the question is a user's;
    without one it's a line of text. Raises TooLittleText if the filler can't fill the longest prompt, or a length can't
    hold the facts.
    """
    rng = random.Random(seed)
    writer = _Writer(tokenizer, filler)
    return [
        writer.case(rng, length, depth) for length in lengths for depth in depths for _ in range(num_cases_per_cell)
    ]


class _Writer:
    """Sentences with their lengths in tokens, and the form of a prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, filler: str) -> None:
        self._tokenizer = tokenizer
        sentences = re.findall(r'\b[A-Z][^.!?\n"]{20,}[.!?](?=\s)', filler)
        lengths = [len(ids) for ids in self._encode([" " + sentence for sentence in sentences])]
        self._sentences = [
            (sentence, length)
            for sentence, length in zip(sentences, lengths, strict=True)
            if length <= _MAX_SENTENCE_TOKENS
        ]

    def case(self, rng: random.Random, length: int, depth: float) -> RetrievalCase:
        names = rng.sample(_NAMES, _NUM_FACTS)
        codes = rng.sample(_CODES, _NUM_FACTS)
        facts = [f"The code of {name} is {code}." for name, code in zip(names, codes, strict=True)]
        asked = round(depth * (_NUM_FACTS - 1))
        room = length - len(self._prompt(" ".join(facts), names[asked]))
        if room < 0:
            raise TooLittleText(f"{_NUM_FACTS} facts don't fit into {length} tokens: ask for longer prompts")
        prompt = self._prompt(_spread(facts, self._fill(rng, room)), names[asked])
        [answer] = self._encode([f" {codes[asked]}"])
        return RetrievalCase(length, depth, prompt, answer)

    def _fill(self, rng: random.Random, room: int) -> list[str]:
        """Sentences that follow one another, as many as fit into ``room`` tokens."""
        taken: list[str] = []
        for sentence, length in self._sentences[rng.randrange(max(1, len(self._sentences) - room)) :]:
            if length > room:
                return taken
            taken.append(sentence)
            room -= length
        raise TooLittleText("the filler is too short for the longest prompt: give more text")

    def _prompt(self, body: str, name: str) -> tuple[int, ...]:
        question, answer = f"What is the code of {name}?", f"The code of {name} is"
        if not self._tokenizer.chat_template:
            [ids] = self._encode([f"{body}\n\nQuestion: {question}\nAnswer: {answer}"])
            return (*opening(self._tokenizer), *ids)
        asked = [{"role": "user", "content": f"{body}\n\n{question}"}]
        text = self._tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        [ids] = self._encode([f"{text}{answer}"])
        return ids

    def _encode(self, texts: list[str]) -> list[tuple[int, ...]]:
        encoded = self._tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [tuple(encoding.ids) for encoding in encoded]


def _spread(facts: list[str], filler: list[str]) -> str:
    """The facts with equal shares of the filler between them."""
    gaps = max(1, len(facts) - 1)
    shares = [filler[gap * len(filler) // gaps : (gap + 1) * len(filler) // gaps] for gap in range(gaps)]
    pieces = [piece for fact, share in zip(facts, [*shares, []], strict=False) for piece in (fact, *share)]
    return " ".join(pieces)
