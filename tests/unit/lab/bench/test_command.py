"""``shoal bench`` as people meet it."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_endpoint import Request, Wire, scripted, whole_answer

import shoal
from shoal.errors import ConfigError
from shoal_lab.bench import require_packages
from shoal_lab.bench.benchmark import Benchmark
from shoal_lab.bench.commands import make_folder, parse_body, parse_key, parse_loads, parse_token_ids
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
    found = Benchmark.from_json((output / "bench.json").read_text())
    assert [level.load for level in found.levels] == [Load(rate=100.0), Load(rate=200.0)]
    assert [len(level.records) for level in found.levels] == [23, 23] and len(bodies) == 2 + 46
    assert found.settings.model == "tiny" and found.goodput == 200
    assert found.levels[0].overall.failures == {Failure.REJECTED: 1}
    assert {record.output_tokens for record in found.levels[1].records} == {5, 2}
    assert {body["depth"] for body in bodies} == {"full"} and {one for b in bodies for one in b["prompt"]} == {5, 6}
    assert "Goodput: 200 requests/s or more" in out and str(output / "report.html") in out
    assert "100 requests/s: 23 of 23" in err
    assert "tiny under load" in (output / "report.html").read_text()


async def test_a_closed_loop_has_no_goodput(tmp_path: Path):
    async with scripted() as server:
        status, out, err = await bench(
            server.url, "--concurrency", "3", "--num-requests", "9", "--prompts", "chat", "--mix", "10:4",
            "--model", "named", "--no-ignore-eos", "--output", str(tmp_path),
        )  # fmt: skip
        requests = server.requests
    assert status == 0, err
    found = Benchmark.from_json((tmp_path / "bench.json").read_text())
    assert found.goodput is None and "Goodput" not in out
    assert "3 at a time: 100.0 % of 9 within both SLOs, 0 failed" in out and "3 at a time: 17 of 17" in err
    assert {request.path for request in requests} == {"/v1/chat/completions"}
    assert all(len(request.body["messages"][0]["content"]) == 40 for request in requests)
    assert all("ignore_eos" not in request.body and request.body["model"] == "named" for request in requests)


async def test_ctrl_c_leaves_the_loads_that_were_measured(tmp_path: Path):
    measured = asyncio.Event()

    async def script(request: Request, wire: Wire) -> None:
        if len(requests.requests) > 1 + 1 + 2:
            measured.set()
            await wire.gone()
        else:
            await whole_answer(request, wire)

    async with scripted(script) as requests:
        task = asyncio.create_task(
            bench(
                requests.url,
                "--rate",
                "100,200",
                "--num-requests",
                "2",
                "--warm-up",
                "0",
                "--output",
                str(tmp_path),
                interrupted_by=measured,
            )
        )
        status, _, err = await task
    assert status == 130 and "Traceback" not in err and str(tmp_path) in err
    assert len(Benchmark.from_json((tmp_path / "bench.json").read_text()).levels) == 1
    assert (tmp_path / "report.html").exists()


async def test_ctrl_c_before_any_load_was_measured_says_so_and_leaves_no_other_run_s_report(tmp_path: Path):
    for name in ("bench.json", "report.html", "notes.txt"):
        (tmp_path / name).write_text("of another run")
    asked = asyncio.Event()

    async def script(request: Request, wire: Wire) -> None:
        asked.set()
        await wire.gone()

    async with scripted(script) as server:
        status, _, err = await bench(server.url, "--output", str(tmp_path), interrupted_by=asked)
    assert status == 130 and "Traceback" not in err
    assert "no load was measured by then" in err and str(tmp_path) not in err
    assert names(tmp_path) == {"notes.txt"}


async def test_a_run_that_fails_leaves_no_other_run_s_report(tmp_path: Path):
    (tmp_path / "bench.json").write_text("of another run")
    async with scripted(models=()) as server:
        status, _, err = await bench(server.url, "--output", str(tmp_path))
    assert status == 2 and "lists no models" in err and names(tmp_path) == set()


@pytest.mark.parametrize(("num_well", "wanted"), [(1, 1), (2, 0)])  # the first of all is of no load
async def test_where_no_request_of_any_load_is_answered_the_status_says_so(num_well: int, wanted: int, tmp_path: Path):
    num_seen = 0

    async def script(request: Request, wire: Wire) -> None:
        nonlocal num_seen
        num_seen += 1
        if num_seen <= num_well:
            await whole_answer(request, wire)
        else:
            await wire.answer({"error": "out of order"}, 500)

    async with scripted(script) as server:
        status, out, err = await bench(
            server.url, "--rate", "500", "--num-requests", "3", "--warm-up", "0", "--output", str(tmp_path)
        )
    assert status == wanted and "Traceback" not in err and str(tmp_path / "report.html") in out


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
    [level] = Benchmark.from_json((tmp_path / "bench.json").read_text()).levels
    assert len(level.records) == 110 and {record.failure for record in level.records} == {None}


async def test_a_folder_that_nobody_may_write_to_is_told_before_anything_is_sent():
    async with scripted() as server:
        status, _, err = await bench(server.url, "--output", "/proc/self")
        assert server.requests == []
    assert status == 2 and "choose another --output" in err.replace("\n", " ")


async def test_the_same_seed_asks_every_endpoint_the_same(tmp_path: Path):
    seen: list[list[Any]] = []
    for _ in range(2):
        async with scripted() as server:
            status, _, err = await bench(
                server.url, "--concurrency", "1", "--num-requests", "5", "--mix", "3-9:1-4", "--seed", "4",
                "--output", str(tmp_path),
            )  # fmt: skip
            assert status == 0, err
            seen.append([request.body for request in server.requests if request.method == "POST"])
    assert seen[0] == seen[1] and len(seen[0]) == 1 + 8 + 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--rate", "1", "--concurrency", "1"), "choose one of them"),
        (("--rate", "fast"), "requests a second"),
        (("--rate", "sweep:x"), "sweep:0.25"),
        (("--rate", "sweep:4,1"), "begins at one rate"),
        (("--duration-s", "inf"), "--duration-s must be more than 0"),
        (("--slo-ttft-ms", "nan"), "more than 0, and finite"),
        (("--timeout-s", "inf"), "--timeout-s must be more than 0"),
        (("--duration-s", "1", "--num-requests", "1"), "leave one of them out"),
        (("--mix", "100"), "prompt:output"),
        (("--slo-tpot-ms", "0"), "more than 0"),
        (("--token-ids", "9-1"), "lowest and the highest"),
        (("--extra-body", "[1]"), "JSON object"),
        (("--api-key-env", "NO_SUCH_VARIABLE_HERE"), "export it first"),
        ((), "can't reach"),
    ],
    ids=" ".join,
)
async def test_an_error_is_a_sentence_that_says_what_to_do(arguments: tuple[str, ...], says: str, tmp_path: Path):
    status, _, err = await bench("http://127.0.0.1:9", *arguments, "--output", str(tmp_path / "out"))
    assert status == 2 and "Traceback" not in err
    assert "error:" in err and says in err.replace("\n", " ")


async def test_what_an_endpoint_says_is_told_letter_by_letter(tmp_path: Path):
    async def script(request: Request, wire: Wire) -> None:
        await wire.answer({"error": {"message": "no [/INST] in [prompt]"}}, 400)

    async with scripted(script) as server:
        status, _, err = await bench(server.url, "--output", str(tmp_path))
    assert status == 2 and "no [/INST] in [prompt]; for other lengths see --mix" in err.replace("\n", " ")


def test_a_folder_that_can_not_be_made_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another --output"):
        make_folder(tmp_path / "file" / "out")


def test_a_file_that_can_not_be_replaced_is_told(tmp_path: Path):
    (tmp_path / "bench.json").mkdir()
    with pytest.raises(ConfigError, match="choose another --output"):
        make_folder(tmp_path, ["bench.json"])


def test_loads_come_from_either_option():
    assert parse_loads("2,1", None) == ((Load(rate=1.0), Load(rate=2.0)), None)
    assert parse_loads(None, "4") == ((Load(concurrency=4),), None)
    assert parse_loads(None, None) == ((Load(rate=1.0),), None)
    assert parse_loads("sweep", None) == ((), 1.0) and parse_loads("sweep:0.25", None) == ((), 0.25)


@pytest.mark.parametrize("text", ["", "5", "5-", "a-b", "-1-4", "7-6"])
def test_token_ids_are_a_range(text: str):
    assert parse_token_ids("5-5") == (5, 5)
    with pytest.raises(ConfigError, match="1000-30000"):
        parse_token_ids(text)


@pytest.mark.parametrize("text", ["{", "[]", "1", "null"])
def test_extra_fields_are_an_object(text: str):
    assert parse_body(None) == {} and parse_body('{"a": 1}') == {"a": 1}
    with pytest.raises(ConfigError, match="object"):
        parse_body(text)


def test_a_key_comes_from_the_environment():
    assert parse_key(None, {}) is None and parse_key("KEY", {"KEY": "secret"}) == "secret"
    with pytest.raises(ConfigError, match="KEY, which isn't set"):
        parse_key("KEY", {"KEY": ""})


def test_blanks_around_a_key_are_none_of_it():
    assert parse_key("KEY", {"KEY": " secret\r\n"}) == "secret"
    with pytest.raises(ConfigError, match="KEY, which isn't set"):
        parse_key("KEY", {"KEY": " \n"})


@pytest.mark.parametrize("key", ["sec\nret", "sécret", "“secret”", "sec\x7fret", "sec\udc80ret"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_told(key: str):
    with pytest.raises(ConfigError, match="KEY, and a key has") as raised:
        parse_key("KEY", {"KEY": key})
    assert "ret" not in str(raised.value)


def test_without_its_packages_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shoal_lab.bench.find_spec", lambda name: None if name == "aiohttp" else object())
    with pytest.raises(ConfigError, match=r"needs aiohttp: pip install '.\[serve,bench\]'"):
        require_packages()
