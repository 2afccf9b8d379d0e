"""The examples of docs/client.md do what they say, just as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from authorities import Authority
from fake_inference import PATIENCE_S, TEXT, FakeInference, serving

from shoal.errors import InvalidRequest

GUIDE = (Path(__file__).parents[3] / "docs" / "client.md").read_text(encoding="utf-8")
EXAMPLES = {
    title: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for title, _, section in (part.partition("\n") for part in GUIDE.split("\n## ")[1:])
}


def run(example: str, target: str) -> None:
    addresses = r"127\.0\.0\.1:9000|gateway\.example:9000"
    assert re.search(addresses, example)
    exec(compile(re.sub(addresses, target, example), "docs/client.md", "exec"), {})


def test_every_example_is_run_here() -> None:
    counted = {title: len(examples) for title, examples in EXAMPLES.items() if examples}
    assert counted == {
        "Five lines": 1,
        "Ask": 2,
        "Read as it is written": 2,
        "What can go wrong": 1,
        "Deadlines and retries": 1,
        "TLS and keys": 1,
        "asyncio": 1,
    }


def test_five_lines(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    [example] = EXAMPLES["Five lines"]
    assert len([line for line in example.splitlines() if line]) <= 5
    run(example, target)
    assert capsys.readouterr().out == TEXT


def test_ask(target: str, service: FakeInference, capsys: pytest.CaptureFixture[str]) -> None:
    run(EXAMPLES["Ask"][0], target)
    assert [request.WhichOneof("prompt") for request in service.requests] == ["text", "token_ids", "chat"]
    assert capsys.readouterr().out == f"{TEXT} 3 shallow\n0 {TEXT} stop\n1 {TEXT} stop\n['smollm2'] True\n"


def test_a_prompt_is_scored(target: str, service: FakeInference, capsys: pytest.CaptureFixture[str]) -> None:
    run(EXAMPLES["Ask"][1], target)
    assert service.requests[0].max_tokens == 0 and service.requests[0].HasField("prompt_logprobs")
    assert capsys.readouterr().out == "-inf shallow\n"


def test_read_as_it_is_written(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(EXAMPLES["Read as it is written"][0], target)
    assert capsys.readouterr().out.startswith(f"{TEXT} Usage(num_prompt_tokens=7, ")


def test_break_ends_the_call(target: str, service: FakeInference, capsys: pytest.CaptureFixture[str]) -> None:
    service.holds = True
    run(EXAMPLES["Read as it is written"][1], target)
    assert service.left.wait(PATIENCE_S)
    assert capsys.readouterr().out == TEXT


def test_what_can_go_wrong(target: str, service: FakeInference, capsys: pytest.CaptureFixture[str]) -> None:
    service.failures = [InvalidRequest("temperature must be at most 2", param="temperature")]
    run(EXAMPLES["What can go wrong"][0], target)
    assert capsys.readouterr().out == "temperature temperature must be at most 2\n"


def test_deadlines_and_retries(target: str, service: FakeInference) -> None:
    run(EXAMPLES["Deadlines and retries"][0], target)
    assert service.num_attempts == 1


def test_tls_and_keys(service: FakeInference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(service, Authority(tmp_path).server(asks_clients=True)) as target:
        run(EXAMPLES["TLS and keys"][0], target)
    assert service.metadata[0]["authorization"] == "Bearer sk-example"


def test_asyncio(target: str, service: FakeInference, capsys: pytest.CaptureFixture[str]) -> None:
    run(EXAMPLES["asyncio"][0], target)
    assert service.num_attempts == 4
    assert capsys.readouterr().out == f"{TEXT}{[TEXT] * 3}\n"
