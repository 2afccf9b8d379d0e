"""The examples of docs/api.md for the Python client do what they say, just as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from authorities import Authority
from fake_inference import PATIENCE_S, TEXT, FakeInference, serving

from shoal.errors import InvalidRequest, Overloaded

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
GUIDE = PAGE.partition("\n## Python client\n")[2]
EXAMPLES = {
    title: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for title, _, section in (part.partition("\n") for part in GUIDE.split("\n### ")[1:])
}


def run(example: str, target: str) -> None:
    addresses = r"127\.0\.0\.1:9000|gateway\.example:9000"
    assert re.search(addresses, example)
    exec(compile(re.sub(addresses, target, example), "docs/api.md", "exec"), {})


def test_every_example_is_run_here() -> None:
    counted = {title: len(examples) for title, examples in EXAMPLES.items() if examples}
    assert counted == {
        "Ask": 1,
        "Stream": 2,
        "Handle errors": 1,
        "TLS and keys": 1,
        "asyncio": 1,
    }


def test_five_lines_of_the_readme(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    [example] = re.findall(r"```python\n(from shoal.client .*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 5
    run(example, target)
    assert capsys.readouterr().out == TEXT


def test_ask(target: str, service: FakeInference, capsys: pytest.CaptureFixture[str]) -> None:
    run(EXAMPLES["Ask"][0], target)
    assert [request.WhichOneof("prompt") for request in service.requests] == ["text", "token_ids", "chat", "text"]
    assert service.requests[3].max_tokens == 0 and service.requests[3].HasField("prompt_logprobs")
    answers = f"{TEXT} 3 shallow\n0 {TEXT} stop\n1 {TEXT} stop\n"
    assert capsys.readouterr().out == f"{answers}-inf shallow\n['smollm2'] True\n"


def test_stream(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(EXAMPLES["Stream"][0], target)
    assert capsys.readouterr().out.startswith(f"{TEXT} Usage(num_prompt_tokens=7, ")


def test_break_ends_the_call(target: str, service: FakeInference, capsys: pytest.CaptureFixture[str]) -> None:
    service.holds = True
    run(EXAMPLES["Stream"][1], target)
    assert service.left.wait(PATIENCE_S)
    assert capsys.readouterr().out == TEXT


def test_handle_errors(target: str, service: FakeInference, capsys: pytest.CaptureFixture[str]) -> None:
    service.failures = [InvalidRequest("temperature must be at most 2", param="temperature")]
    run(EXAMPLES["Handle errors"][0], target)
    assert capsys.readouterr().out == "temperature temperature must be at most 2\n"


def test_one_attempt_is_one(target: str, service: FakeInference) -> None:
    service.failures = [Overloaded("full", retry_after_s=1)]
    run(EXAMPLES["Handle errors"][0], target)
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
