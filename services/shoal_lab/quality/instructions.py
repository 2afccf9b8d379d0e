"""Instructions whose following a program can check: a small table in the manner of IFEval, with prompts of our own.

What is checked is form alone (length, letters, lists, JSON …), never whether the answer is right, so that a model of
any size can be asked and no judge is needed. An answer counts if all checks of its case pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_BULLET = re.compile(r"^[ \t]*[-*•][ \t]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*(\d+)[.)][ \t]+\S", re.MULTILINE)
_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n[ \t]*```", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?]+(?=[\"')\]]*(?:\s|$))")


@dataclass(frozen=True, slots=True)
class Check:
    """One verifiable demand. ``name`` says it in a report."""

    name: str
    passes: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Instruction:
    """A user's message and what its answer must be like."""

    prompt: str
    checks: tuple[Check, ...]

    def score(self, answer: str) -> float:
        """The share of checks that pass: 1.0 if the instruction was followed. An empty answer follows none."""
        text = answer.strip()
        return sum(bool(text) and check.passes(text) for check in self.checks) / len(self.checks)


def max_words(limit: int) -> Check:
    return Check(f"at most {limit} words", lambda text: len(text.split()) <= limit)


def min_words(limit: int) -> Check:
    return Check(f"at least {limit} words", lambda text: len(text.split()) >= limit)


def num_sentences(number: int) -> Check:
    return Check(f"{number} sentences", lambda text: len(_SENTENCE_END.findall(text)) == number)


def num_paragraphs(number: int) -> Check:
    """Paragraphs are parted by blank lines."""
    return Check(f"{number} paragraphs", lambda text: len(re.split(r"\n[ \t]*\n\s*", text)) == number)


def num_bullets(number: int) -> Check:
    return Check(f"{number} bullet points", lambda text: len(_BULLET.findall(text)) == number)


def numbered(number: int) -> Check:
    """Lines that begin with 1, 2, … ``number``, and no others that are numbered."""
    wanted = [str(index) for index in range(1, number + 1)]
    return Check(f"a numbered list of {number}", lambda text: _NUMBERED.findall(text) == wanted)


def lower_case() -> Check:
    return Check("lower case", lambda text: text == text.lower())


def upper_case() -> Check:
    return Check("capital letters", lambda text: text == text.upper() and text != text.lower())


def without(characters: str) -> Check:
    return Check(f"none of {characters!r}", lambda text: not set(characters) & set(text))


def contains(word: str, at_least: int = 1) -> Check:
    """As a whole word, in any case."""
    pattern = re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE)
    return Check(f"{word!r} at least {at_least} times", lambda text: len(pattern.findall(text)) >= at_least)


def avoids(word: str) -> Check:
    pattern = re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE)
    return Check(f"not {word!r}", lambda text: not pattern.search(text))


def starts_with(phrase: str) -> Check:
    return Check(f"starts with {phrase!r}", lambda text: text.startswith(phrase))


def ends_with(phrase: str) -> Check:
    return Check(f"ends with {phrase!r}", lambda text: text.endswith(phrase))


def one_of(*answers: str) -> Check:
    """Nothing but one of ``answers``, in any case; a full stop may follow."""
    wanted = {answer.lower() for answer in answers}
    return Check(f"one of {answers}", lambda text: text.lower().removesuffix(".") in wanted)


def quoted() -> Check:
    return Check("in double quotes", lambda text: len(text) > 2 and text[0] in '"“' and text[-1] in '"”')


def only_json(*keys: str) -> Check:
    """Nothing but a JSON object, fenced or not, with exactly ``keys``."""
    return Check(f"JSON with {', '.join(keys)}", lambda text: _json_keys(text) == set(keys))


def placeholders(number: int) -> Check:
    return Check(f"{number} [placeholders]", lambda text: len(re.findall(r"\[[^\[\]\n]+\]", text)) >= number)


def _json_keys(text: str) -> set[str] | None:
    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    return set(value) if isinstance(value, dict) else None


def _table(*rows: tuple[str, Sequence[Check]]) -> tuple[Instruction, ...]:
    return tuple(Instruction(prompt, tuple(checks)) for prompt, checks in rows)


INSTRUCTIONS = _table(
    # length
    ("Describe the ocean in at most 20 words.", [max_words(20)]),
    ("What is a library? Answer in no more than 15 words.", [max_words(15)]),
    ("Explain what a magnet does. Use at least 60 words.", [min_words(60)]),
    ("Tell me about bicycles in at least 80 words.", [min_words(80)]),
    ("Describe a rainy day in exactly two sentences.", [num_sentences(2)]),
    ("Why do we sleep? Answer in exactly one sentence.", [num_sentences(1)]),
    ("What is bread made of? Write exactly three sentences.", [num_sentences(3)]),
    ("Write two paragraphs about mountains, with a blank line between them.", [num_paragraphs(2)]),
    ("Write three paragraphs about the history of writing, with blank lines between them.", [num_paragraphs(3)]),
    ("Is the sun a star? Answer with one word: yes or no.", [one_of("yes", "no")]),
    ("Is water dry? Answer with a single word, either true or false.", [one_of("true", "false")]),
    ("Which is larger, a mouse or an elephant? Answer with one word only.", [max_words(1)]),
    # lists
    ("List three fruits as bullet points. Begin each line with a hyphen.", [num_bullets(3)]),
    ("Give me five tips for learning a language as bullet points that begin with '- '.", [num_bullets(5)]),
    ("Name four things to pack for a hike, as bullet points that begin with '* '.", [num_bullets(4)]),
    ("Write a numbered list of three uses of a paper clip.", [numbered(3)]),
    ("Write a numbered list of exactly four animals that live in the sea.", [numbered(4)]),
    ("How do I make tea? Write five numbered steps.", [numbered(5)]),
    ("Name two colours as bullet points that begin with a hyphen, in lower case.", [num_bullets(2), lower_case()]),
    ("List three planets in a numbered list, at most 20 words in all.", [numbered(3), max_words(20)]),
    # letters and punctuation
    ("What is a volcano? Write your whole answer in lower case letters.", [lower_case()]),
    ("Write one sentence about cats. Do not use any capital letters.", [lower_case()]),
    ("SAY SOMETHING KIND ABOUT TREES. USE CAPITAL LETTERS ONLY.", [upper_case()]),
    ("Write a warning sign for a wet floor, all in capital letters.", [upper_case()]),
    ("Describe your favourite season without using any commas.", [without(",")]),
    ("Explain how rain forms. Do not use commas anywhere in your answer.", [without(",")]),
    ("Greet a new neighbour in two or three sentences. Do not use exclamation marks.", [without("!")]),
    ("What is a calendar for? Answer without any digits.", [without("0123456789")]),
    ("Give a quotation about courage, and put your whole answer in double quotation marks.", [quoted()]),
    ("Suggest a title for a story about a lighthouse. Wrap it in double quotation marks.", [quoted()]),
    # words
    ("Write a short story about a dog. Use the word 'river' in it.", [contains("river")]),
    ("Describe a market. Your answer must contain the words 'apples' and 'noise'.",
     [contains("apples"), contains("noise")]),
    ("Write about winter and use the word 'snow' at least three times.", [contains("snow", 3)]),
    ("Describe the taste of a lemon without the word 'sour'.", [avoids("sour")]),
    ("Explain what a doctor does without using the word 'patient'.", [avoids("patient")]),
    ("What is the moon? Do not use the words 'earth' or 'planet'.", [avoids("earth"), avoids("planet")]),
    # beginnings and ends
    ("Tell me how to boil an egg. Start your answer with the words 'First of all'.", [starts_with("First of all")]),
    ("What is music? Begin your answer with 'In short'.", [starts_with("In short")]),
    ("Write a letter to a friend. It must begin with 'Dear Sam'.", [starts_with("Dear Sam")]),
    ("Recommend a sport. End your answer with exactly this sentence: That is my advice.",
     [ends_with("That is my advice.")]),
    ("Explain what honey is. Finish with the words: Any other questions?", [ends_with("Any other questions?")]),
    ("Tell a very short bedtime story that ends with the words: The end.", [ends_with("The end.")]),
    # formats
    ("Describe a book as a JSON object with the keys title and author. Answer with the JSON only.",
     [only_json("title", "author")]),
    ("Give a city as JSON with exactly the keys name, country and population. No other text.",
     [only_json("name", "country", "population")]),
    ("Answer with nothing but a JSON object that has one key, answer: what colour is grass?", [only_json("answer")]),
    ("Write a template of an invitation with at least three placeholders in square brackets, such as [name].",
     [placeholders(3)]),
    ("Write a one-line address template with two placeholders in square brackets, such as [street].",
     [placeholders(2), num_paragraphs(1)]),
    # several at once
    ("Describe the wind in at most 25 words, in lower case, without commas.",
     [max_words(25), lower_case(), without(",")]),
    ("Begin with 'Yes', use the word 'water', and write at most 30 words: do plants drink?",
     [starts_with("Yes"), contains("water"), max_words(30)]),
    ("Give two bullet points about honesty, each beginning with a hyphen, and use no more than 30 words.",
     [num_bullets(2), max_words(30)]),
)  # fmt: skip
