"""``shoal eval``: what a shallow prompt costs, next to full depth and to what goes wrong without parts of the method.

All arms are measured on the same passages and cases, so that what is compared is paired. A run
chooses nothing by its results: texts are of the evaluation split, the projectors are given, and the retrieval cells
that count are chosen by cases of another seed. What was once looked at before calibration's own defaults were fixed,
docs/quality.md says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pydantic import TypeAdapter

from shoal.errors import ConfigError
from shoal.model.files import ModelFiles
from shoal.model.plan import LayerPlan
from shoal.model.projector import require_model
from shoal_lab.quality.arms import arms_of, find_projectors
from shoal_lab.quality.evaluation_options import EvaluationOptions, Task, checked
from shoal_lab.quality.greedy_scores import GreedyScore, score_greedy
from shoal_lab.quality.notes import notes_on
from shoal_lab.quality.prefill_times import PrefillTime, measure_prefill
from shoal_lab.quality.retrieval import DEPTHS, RetrievalCase, retrieval_cases
from shoal_lab.quality.retrieval_scores import RetrievalScore, score_retrieval
from shoal_lab.quality.subject import Subject
from shoal_lab.quality.text_scores import ALL_KINDS, TextScore, measure_passages, score_texts
from shoal_lab.quality.texts import Kind, Passage, Split, Text, load, opening, passages, read

_LONGEST_CODE_TOKENS = 16

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class TextRead:
    """A kind of text, and the SHA-256 (hex) of what was read."""

    kind: str
    digest: str


@dataclass(frozen=True, slots=True)
class ProjectorUsed:
    """The projector for so many skipped layers, SHA-256 (hex) of its file, and the kinds of text it learnt from."""

    num_skipped: int
    digest: str
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """All that the figures depend on, besides the machine."""

    model: str
    model_digest: str
    num_layers: int
    skip_layers: tuple[int, ...]
    tasks: tuple[Task, ...]
    num_passages: int
    num_cases: int
    prompt_tokens: int
    continuation_tokens: int
    greedy_tokens: int
    seed: int
    dtype: str
    device: str
    texts: tuple[TextRead, ...]
    projectors: tuple[ProjectorUsed, ...]
    kernels: str = ""  # native or torch


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result, as ``evaluation.json`` has it. A task that wasn't asked for is empty.

    ``notes`` are sentences on figures that say too little.
    """

    settings: EvaluationSettings
    texts: tuple[TextScore, ...]
    greedy: tuple[GreedyScore, ...]
    retrieval: tuple[RetrievalScore, ...]
    prefill: tuple[PrefillTime, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        return _EVALUATION.dump_json(self, indent=2).decode() + "\n"


_EVALUATION = TypeAdapter(Evaluation)


def evaluate(files: ModelFiles, options: EvaluationOptions, on_progress: Progress) -> Evaluation:
    """Raises ConfigError, DataError or ModelError; all that can be refused without the weights is refused first."""
    run = _Run(files, options, on_progress)
    run.load()
    texts, greedy, retrieval = run.texts(), run.greedy(), run.retrieval()
    return Evaluation(
        settings=run.settings,
        texts=tuple(texts),
        greedy=tuple(greedy),
        retrieval=tuple(retrieval),
        prefill=tuple(run.prefill()),
        notes=notes_on(texts, greedy, retrieval),
    )


class _Run:
    """One evaluation: what is measured on is made at once, the model's weights are read by ``load``."""

    def __init__(self, files: ModelFiles, options: EvaluationOptions, on_progress: Progress) -> None:
        spec = files.spec()
        self._files, self._on_progress = files, on_progress
        require_model(options.projector, files)
        self._counts = options.skip_layers or (LayerPlan.default(spec.num_layers).num_skipped,)
        self._options = checked(options, self._counts, spec.num_layers, spec.max_context_tokens)
        self._projectors = find_projectors(options.projector, files, self._counts, spec.num_layers)
        self._tokenizer = files.tokenizer()
        texts = self._read_texts()
        names = [text.kind for text in texts]
        if len(set(names)) < len(names) or ALL_KINDS in names:
            raise ConfigError(f"texts are told apart by their files' names ({', '.join(names)}): rename one")
        self._passages = {text.kind: self._cut(text) for text in texts}
        self._max_context_tokens = spec.max_context_tokens
        self._cases = self._retrieval_cases(options.seed)
        self._choosing = self._retrieval_cases(options.seed + 1)
        self.settings = EvaluationSettings(
            model=files.model_id,
            model_digest=files.digest,
            num_layers=spec.num_layers,
            skip_layers=self._counts,
            tasks=options.tasks,
            num_passages=options.num_passages,
            num_cases=options.num_cases,
            prompt_tokens=options.prompt_tokens,
            continuation_tokens=options.continuation_tokens,
            greedy_tokens=options.greedy_tokens,
            seed=options.seed,
            dtype=str(options.dtype).removeprefix("torch."),
            device=options.device.type,
            texts=tuple(TextRead(text.kind, text.digest) for text in texts),
            projectors=tuple(
                ProjectorUsed(count, found.digest, found.header.kinds) for count, found in self._projectors.items()
            ),
        )

    def load(self) -> None:
        """Read the weights."""
        options = self._options
        longest = options.prompt_tokens + max(options.continuation_tokens, options.greedy_tokens)
        self._subject = Subject.load(
            self._files,
            dtype=options.dtype,
            device=options.device,
            max_tokens=max([longest, *(len(case.prompt) + len(case.answer) for case in self._cases + self._choosing)]),
            on_progress=partial(self._on_progress, "layers"),
        )
        self.settings = replace(self.settings, kernels=self._subject.kernels)
        self._arms = arms_of(
            self._subject, self._counts, self._projectors, options.boundary_tokens, controls=options.controls,
            int8=options.int8,
        )  # fmt: skip

    def texts(self) -> list[TextScore]:
        if Task.TEXT not in self._options.tasks:
            return []
        figures = {
            kind: measure_passages(self._subject, self._arms, found, partial(self._on_progress, f"{kind} passages"))
            for kind, found in self._passages.items()
        }
        return score_texts(self._arms, figures, self._options.continuation_tokens, seed=self._options.seed)

    def greedy(self) -> list[GreedyScore]:
        if Task.GREEDY not in self._options.tasks:
            return []
        prompts = [
            passage.prompt for found in self._passages.values() for passage in _spread(found, self._options.num_greedy)
        ]
        return score_greedy(
            self._subject, self._arms, prompts, max_tokens=self._options.greedy_tokens, seed=self._options.seed,
            on_progress=partial(self._on_progress, "greedy answers"),
        )  # fmt: skip

    def retrieval(self) -> list[RetrievalScore]:
        if Task.RETRIEVAL not in self._options.tasks:
            return []
        return score_retrieval(
            self._subject, self._arms, self._cases, self._choosing, seed=self._options.seed,
            on_progress=partial(self._on_progress, "retrieval cases"),
        )  # fmt: skip

    def prefill(self) -> list[PrefillTime]:
        if Task.TEXT not in self._options.tasks:
            return []
        prompt = next(iter(self._passages.values()))[0].prompt
        return measure_prefill(
            self._subject, prompt, self._counts, partial(self._on_progress, "prefill timings"), seed=self._options.seed
        )

    def _read_texts(self) -> list[Text]:
        if not {Task.TEXT, Task.GREEDY} & set(self._options.tasks):
            return []
        if self._options.data:
            return [read(path, self._tokenizer) for path in self._options.data]
        return [load(kind, Split.EVALUATION) for kind in self._options.kinds]

    def _cut(self, text: Text) -> list[Passage]:
        options = self._options
        return passages(
            text.kind, text.token_ids(self._tokenizer), num_prompt=options.prompt_tokens,
            num_continuation=options.continuation_tokens, limit=options.num_passages, at_least=options.num_passages,
            opening=opening(self._tokenizer),
            remedy="give more or longer text, or lower --passages, --prompt-tokens or --continuation-tokens",
        )  # fmt: skip

    def _retrieval_cases(self, seed: int) -> list[RetrievalCase]:
        options = self._options
        if Task.RETRIEVAL not in options.tasks:
            return []
        room = self._max_context_tokens - _LONGEST_CODE_TOKENS
        lengths = [length for length in options.retrieval_lengths if length <= room]
        if not lengths:
            raise ConfigError(f"no retrieval prompt fits {self._max_context_tokens} tokens: leave it out of --tasks")
        filler = load(Kind.PROSE, Split.EVALUATION).documents[0]
        return retrieval_cases(
            self._tokenizer, filler, seed=seed, num_cases_per_cell=options.num_cases, lengths=lengths, depths=DEPTHS
        )


def _spread(found: Sequence[Passage], number: int) -> list[Passage]:
    """``number`` of them, evenly."""
    number = min(number, len(found))
    return [found[index * len(found) // number] for index in range(number)]
