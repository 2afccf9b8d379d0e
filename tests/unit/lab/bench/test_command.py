"""``shoal bench`` as people meet it."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from scripted_endpoint import Request, Wire, scripted, whole_answer
from typer.testing import CliRunner

import shoal
from shoal.cli import app
from shoal.errors import ConfigError
from shoal_lab.bench.benchmark import Benchmark
from shoal_lab.bench.commands import parse_key
from shoal_lab.bench.load import Load
from shoal_lab.bench.record import Failure


async def bench(
    *arguments: str, interrupted_by: asyncio.Event | None = None, first: str = ""
) -> tuple[int | None, str, str]:
    """Exit status, stdout, stderr. ``first`` is what the process runs before."""
    program = f"{first}import signal, sys; sys.path.insert(0, {str(Path(shoal.__file__).parents[1])!r}); "
    # A test run in the background has Ctrl-C ignored, and so would what it starts.
    program += "signal.signal(signal.SIGINT, signal.default_int_handler); from shoal.cli.command import main; main()"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, "bench", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    if interrupted_by is not None:
        await interrupted_by.wait()
        process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_an_open_loop_leaves_a_result_and_a_page_and_says_the_goodput(tmp_path: Path):
    num_seen = 0

    async def script(request: Request, wire: Wire) -> None:
        nonlocal num_seen
        num_seen += 1
        if num_seen == 20:
            await wire.answer({"error": {"message": "enough"}}, 429)
        else:
            await whole_answer(request, wire)

    output = tmp_path / "deep" / "out"
    async with scripted(script, models=("tiny",)) as server:
        status, out, err = await bench(
            server.url, "--rate", "200,100", "--num-requests", "20", "--warm-up", "3", "--mix", "8-12:5:1,3:2:1",
            "--slo-ttft-ms", "60000", "--slo-tpot-ms", "60000", "--extra-body", '{"depth": "full"}',
            "--token-ids", "5-6", "--output", str(output),
        )  # fmt: skip
        bodies = [request.body for request in server.requests if request.method == "POST"]
    assert status == 0, err
    assert {path.name for path in output.iterdir()} == {"bench.json", "report.html"}
    found = TypeAdapter(Benchmark).validate_json((output / "bench.json").read_text())
    assert [level.load for level in found.levels] == [Load(rate=100.0), Load(rate=200.0)]
    assert [len(level.records) for level in found.levels] == [23, 23] and len(bodies) == 2 + 46
    assert found.settings.model == "tiny" and found.goodput == 200
    assert found.levels[0].overall.failures == {Failure.REJECTED: 1}
    assert {record.output_tokens for record in found.levels[1].records} == {5, 2}
    assert {body["depth"] for body in bodies} == {"full"} and {one for b in bodies for one in b["prompt"]} == {5, 6}
    assert "Goodput: 200 requests/s or more" in out and str(output / "report.html") in out
    assert "100 requests/s: 23 of 23" in err
    assert "tiny under load" in (output / "report.html").read_text()


async def test_ctrl_c_leaves_the_loads_that_were_measured(tmp_path: Path):
    measured = asyncio.Event()

    async def script(request: Request, wire: Wire) -> None:
        if len(requests.requests) > 1 + 1 + 2:
            measured.set()
            await wire.gone()
        else:
            await whole_answer(request, wire)

    async with scripted(script) as requests:
        status, _, err = await bench(
            requests.url, "--rate", "100,200", "--num-requests", "2", "--warm-up", "0", "--output", str(tmp_path),
            interrupted_by=measured,
        )  # fmt: skip
    assert status == 130 and "Traceback" not in err and str(tmp_path) in err
    assert len(TypeAdapter(Benchmark).validate_json((tmp_path / "bench.json").read_text()).levels) == 1
    assert (tmp_path / "report.html").exists()


async def test_a_run_that_fails_leaves_no_other_run_s_report(tmp_path: Path):
    (tmp_path / "bench.json").write_text("of another run")
    async with scripted(models=()) as server:
        status, _, err = await bench(server.url, "--output", str(tmp_path))
    assert status == 2 and "lists no models" in err and names(tmp_path) == set()


async def test_where_no_request_of_any_load_is_answered_the_status_says_so(tmp_path: Path):
    num_seen = 0

    async def script(request: Request, wire: Wire) -> None:
        nonlocal num_seen
        num_seen += 1
        if num_seen == 1:  # of no load
            await whole_answer(request, wire)
        else:
            await wire.answer({"error": "out of order"}, 500)

    async with scripted(script) as server:
        status, out, err = await bench(
            server.url, "--rate", "500", "--num-requests", "3", "--warm-up", "0", "--output", str(tmp_path)
        )
    assert status == 1 and "Traceback" not in err and str(tmp_path / "report.html") in out


async def test_as_many_connections_are_opened_as_the_system_allows(tmp_path: Path):
    """All clients wait for one another."""
    num_seen, all_are_here = 0, asyncio.Event()

    async def script(request: Request, wire: Wire) -> None:
        nonlocal num_seen
        num_seen += 1
        if num_seen == 1 + 100:
            all_are_here.set()
        if num_seen > 1:
            await all_are_here.wait()
        await whole_answer(request, wire)

    few = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (64, r.getrlimit(r.RLIMIT_NOFILE)[1])); "
    async with scripted(script) as server:
        status, _, err = await bench(
            server.url, "--concurrency", "100", "--num-requests", "10", "--mix", "3:1", "--timeout-s", "60",
            "--output", str(tmp_path), first=few,
        )  # fmt: skip
    assert status == 0, err
    [level] = TypeAdapter(Benchmark).validate_json((tmp_path / "bench.json").read_text()).levels
    assert len(level.records) == 110 and {record.failure for record in level.records} == {None}


async def test_a_folder_that_nobody_may_write_to_is_told_before_anything_is_sent():
    async with scripted() as server:
        status, _, err = await bench(server.url, "--output", "/proc/self")
        assert server.requests == []
    assert status == 2 and "choose another --output" in err.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--rate", "1", "--concurrency", "1"), "choose one of them"),
        (("--rate", "fast"), "requests a second"),
        (("--rate", "sweep:x"), "sweep:0.25"),
        (("--rate", "sweep:4,1"), "begins at one rate"),
        (("--duration-s", "1", "--num-requests", "1"), "leave one of them out"),
        (("--mix", "100"), "prompt:output"),
        (("--token-ids", "9-1"), "lowest and the highest"),
        (("--token-ids", "5-"), "1000-30000"),
        (("--extra-body", "[1]"), "JSON object"),
        (("--extra-body", "{"), "isn't JSON"),
        (("--api-key-env", "NO_SUCH_VARIABLE_HERE"), "export it first"),
    ],
    ids=" ".join,
)
def test_an_error_is_a_sentence_that_says_what_to_do(arguments: tuple[str, ...], says: str, tmp_path: Path):
    done = CliRunner().invoke(app, ["bench", "http://127.0.0.1:9", *arguments, "--output", str(tmp_path / "out")])
    assert isinstance(done.exception, ConfigError) and says in done.exception.message


async def test_an_endpoint_that_is_not_there_is_an_error_without_a_traceback(tmp_path: Path):
    status, _, err = await bench("http://127.0.0.1:9", "--output", str(tmp_path / "out"))
    assert status == 2 and "Traceback" not in err
    assert "error:" in err and "can't reach" in err.replace("\n", " ")


def test_a_key_comes_from_the_environment():
    assert parse_key(None, {}) is None and parse_key("KEY", {"KEY": "secret"}) == "secret"
    with pytest.raises(ConfigError, match="KEY, which isn't set"):
        parse_key("KEY", {"KEY": ""})


@pytest.mark.parametrize("key", ["sec\nret", "sécret", "“secret”", "sec\x7fret", "sec\udc80ret"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_told(key: str):
    with pytest.raises(ConfigError, match="KEY, and a key has") as raised:
        parse_key("KEY", {"KEY": key})
    assert "ret" not in str(raised.value)
