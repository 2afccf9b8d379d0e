"""For all tests: what must be set before torch loads, the references they share, and what was excused."""

from __future__ import annotations

import os

# Several processes of a test run share the cores: threads that spin while they wait would starve the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Dozens of clusters start and end here: Serve's controller looks after its replicas five times a second, not two.
os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.2")

# Most tests' prompts are short, and are to be handed over all the same.
os.environ.setdefault("SHOAL_HANDOFF__MIN_TOKENS", "2")

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core
    os.environ["OMP_NUM_THREADS"] = "1"

import sys
from collections.abc import Mapping
from pathlib import Path

import examples  # how hypothesis looks for them, in all tests
import pytest

# pytest makes checks of the assertions in tests, which hold under python -O, too; so it shall of those in helpers.
_HELPERS = {path.stem for path in (Path(__file__).parent / "support").glob("*.py")}
pytest.register_assert_rewrite(*sorted(_HELPERS - {examples.__name__}))

EXIT_STATUS = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def known() -> Mapping[str, object]:
    """The twenty real prompts by name, with what the references say to them (``real_prompts.RealPrompt``)."""
    from real_prompts import real_prompts

    return {prompt.name: prompt for prompt in real_prompts()}


@pytest.fixture
def free_port() -> int:
    """A port of the loopback that nothing listens on, and that the system gives to nobody meanwhile."""
    from shoal.cluster import ports

    return ports.free_port("127.0.0.1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("SHOAL_TEST_ALL") != "1":
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip("takes long: SHOAL_TEST_ALL=1 runs it"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End without the interpreter's teardown, where Ray was here.

    Once, after all tests had passed, a native thread called into memory that the teardown had freed. Whose thread it
    was isn't known: Ray's, gRPC's and torch's all outlive their Python here, and none can be waited for.
    """
    if "ray" in sys.modules and "PYTEST_XDIST_WORKER" not in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash.get(EXIT_STATUS, int(pytest.ExitCode.INTERNAL_ERROR)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Every difference from a reference that was excused, whatever the run's verbosity."""
    # Looked up, not imported: a run without these tests needn't load torch.
    compared = sys.modules.get("real_prompts")
    excused = [] if compared is None else compared.EXCUSED
    if excused:
        terminalreporter.section(f"excused differences from the references: {len(excused)}", yellow=True)
        for line in excused:
            terminalreporter.line(line)
