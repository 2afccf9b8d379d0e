"""A folder for results is there before the work, and not left behind without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import ConfigError
from shoal_lab.report.folder import output_folder


@pytest.mark.parametrize("stop", [ConfigError("no"), KeyboardInterrupt()], ids=str)
def test_what_was_made_and_is_empty_is_removed(tmp_path: Path, stop: BaseException):
    (tmp_path / "there").mkdir()
    with pytest.raises(type(stop)), output_folder(tmp_path / "there" / "a" / "b"):
        raise stop
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and not list((tmp_path / "there").iterdir())


def test_results_stay_and_so_does_an_empty_folder_of_the_users(tmp_path: Path):
    with output_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert (tmp_path / "a" / "b" / "result").exists()
    (tmp_path / "mine").mkdir()
    with output_folder(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_where_nothing_can_be_written_it_is_said_and_nothing_left(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="choose another --output"), output_folder(tmp_path / "file" / "a"):
        pytest.fail("there is no folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_run_s_files_go_before_the_work(tmp_path: Path):
    for name in ("bench.json", "notes.txt"):
        (tmp_path / name).touch()
    with output_folder(tmp_path, ["bench.json", "report.html"]):
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_that_can_not_be_replaced_is_told(tmp_path: Path):
    (tmp_path / "bench.json").mkdir()
    with pytest.raises(ConfigError, match="choose another --output"), output_folder(tmp_path, ["bench.json"]):
        pytest.fail("another run's file is there")
