"""The command line as people meet it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from models import save_tiny
from own_logging import own_logging
from typer.testing import CliRunner

from shoal.cli import app
from shoal.cli.command import main
from shoal.decode.worker import DecodeWorker
from shoal.wire.messages import Depth, GenerateRequest, TokenOutput


def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from shoal.cli.command import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def within(*arguments: str, stdin: str = "") -> Result:
    """The same in this process, which has all imported."""
    with own_logging():
        return CliRunner().invoke(app, arguments, input=stdin)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["eval", "calibrate"])
def test_what_can_not_go_on_says_so_when_it_is_stopped_and_leaves_nothing(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_tiny(tmp_path / "model", dtype=torch.float32, layers=3, context=1024)

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shoal_lab.quality.subject.Subject.load", stopped)
    output = tmp_path / "new" / ("out" if command == "eval" else "p.safetensors")
    wanted = {"eval": ["--tasks", "text", "--passages", "2"], "calibrate": ["--skip-layers", "2", "--kinds", "code"]}[
        command
    ]
    said = CliRunner().invoke(app, [command, str(tmp_path / "model"), "--output", str(output), *wanted])
    assert said.exit_code == 130 and "nothing is kept" in said.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("generate", "hello", "--model", "no-such-model"), "no-such-model"),
        (("generate", "hello", "--skip-layers", "30"), "skip_layers is 30"),
        (("generate", "hello", "--anchors", "4"), "anchors are speed's"),
        (("analyze", "smollm2", "--candidates", "4;8"), "commas"),
        (("eval", "smollm2", "--tasks", "text,reading"), "'reading' is not a valid Task"),
        (("calibrate", "smollm2", "--skip-layers", "30"), "choose 2 to 29"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_error_is_a_sentence_and_not_a_traceback(
    arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """In this process: to start another one for each takes far longer than what is tested."""
    monkeypatch.setattr(sys, "argv", ["shoal", *arguments])
    monkeypatch.setattr("shoal.telemetry.configure_logging", lambda *_, **__: None)  # the tests' own stays
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "error:" in said and says in said.replace("\n", " ")
    assert "Traceback" not in said


def test_an_error_ends_the_process_with_its_sentence():
    said = shoal("serve", "missing.yaml")
    assert said.returncode == 2
    assert "error:" in said.stderr and "missing.yaml" in said.stderr.replace("\n", " ")
    assert "Traceback" not in said.stderr


def test_with_the_client_alone_the_command_says_what_to_install():
    code = "import importlib.util as util; util.find_spec = lambda name: None; import shoal.cli.command as c; c.main()"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 1 and "pip install" in said.stderr and "Traceback" not in said.stderr


def test_generate_answers_in_one_process(tmp_path: Path):
    save_tiny(tmp_path, dtype=torch.float32, layers=3)
    options = ("--model", str(tmp_path), "--max-tokens", "5", "--dtype", "float32")
    said = within("generate", "-", *options, stdin="hello")
    assert said.exit_code == 0, said.output
    assert len(said.stdout.rstrip("\n")) > 0
    assert within("generate", "hello", *options).stdout == said.stdout


def test_generate_draws_anew_unless_a_seed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And goes by the configured depth, as a server does."""
    save_tiny(tmp_path, dtype=torch.float32, layers=3)
    asked: list[GenerateRequest] = []

    async def noted(_worker: DecodeWorker, request: GenerateRequest) -> AsyncIterator[TokenOutput]:
        asked.append(request)
        yield TokenOutput(0, (1,), "a")

    monkeypatch.setattr(DecodeWorker, "generate", noted)
    options = ["generate", "hello", "--model", str(tmp_path), "--dtype", "float32", "--temperature", "0.8"]
    for more, depth in ((["--seed", "7"], "full"), ([], "full"), ([], "shallow"), (["--depth", "full"], "shallow")):
        monkeypatch.setenv("SHOAL_MODEL__DEPTH", depth)
        assert within(*options, *more).exit_code == 0
    seeds, depths = [one.sampling.seed for one in asked], [one.depth for one in asked]
    assert seeds[0] == 7 and len(set(seeds)) == 4
    assert depths == [Depth.FULL, Depth.FULL, Depth.SHALLOW, Depth.FULL]


@pytest.mark.slow
def test_analyze_leaves_a_result_a_page_and_a_plot(tmp_path: Path):
    save_tiny(tmp_path / "model", dtype=torch.float32, layers=4)
    output = tmp_path / "out"
    command = ("analyze", str(tmp_path / "model"), "--samples", "8", "--response-tokens", "4", "--output", str(output))
    said = within(*command)
    assert said.exit_code == 0, said.output
    assert "recommended: --skip-layers" in said.stdout and "report.html" in said.stdout
    names = {path.name for path in output.iterdir()}
    assert names == {"analysis.json", "importance.svg", "report.html"}
    again = within(*command)
    assert again.stdout == said.stdout


@pytest.mark.slow
def test_eval_leaves_a_result_and_a_page_and_says_the_main_figures(tmp_path: Path):
    save_tiny(tmp_path / "model", dtype=torch.float32, layers=3)
    (tmp_path / "mine.txt").write_text("A text of my own, letter by letter. " * 20)
    output = tmp_path / "deep" / "out"
    said = within(
        "eval", str(tmp_path / "model"), "--data", str(tmp_path / "mine.txt"), "--tasks", "text,greedy",
        "--skip-layers", "2,1", "--passages", "2", "--prompt-tokens", "20", "--continuation-tokens", "4",
        "--output", str(output),
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    assert "shallow, 2 skipped: perplexity" in said.stdout and str(output / "report.html") in said.stdout
    assert {path.name for path in output.iterdir()} == {"evaluation.json", "report.html"}
