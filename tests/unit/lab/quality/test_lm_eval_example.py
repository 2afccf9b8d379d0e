"""The tasks for lm-evaluation-harness that the documents show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[4] / "docs" / "examples" / "lm-eval"


def test_each_question_has_its_answer_once_among_four():
    lines = (FOLDER / "capitals.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    assert len({question["country"] for question in questions}) == len(questions) == 64
    for question in questions:
        assert len(set(question["choices"])) == 4
        assert question["choices"][question["answer"]] == question["capital"]


@pytest.mark.parametrize("task", ["capitals", "capitals_choice"])
def test_a_task_reads_the_data_beside_it_and_does_not_give_answers_away(task: str):
    document = yaml.safe_load((FOLDER / f"{task}.yaml").read_text(encoding="utf-8"))
    assert document["task"] == task
    assert (FOLDER / document["dataset_kwargs"]["data_files"]["test"]).is_file()
    assert "{{capital}}" not in document["doc_to_text"]
    for line in (FOLDER / "capitals.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["capital"] not in document["doc_to_text"]
