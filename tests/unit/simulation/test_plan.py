"""The best ratio and skip count, what is said of it, and the command as people meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from simulate import simulate
from simulation.bound import bound
from simulation.commands import parse_fleets
from simulation.plan import Outcome, Plan, PlanOptions, make_plan, planned_requests, ratios
from simulation.plan_page import render_plan, summarize_plan
from simulation.routing import Routing
from simulation.system import Fleet
from simulations import COSTS, SHIP_ALL, costs
from typer.testing import CliRunner

from shoal.config import HandoffConfig, ShoalConfig, StageConfig
from shoal.errors import ConfigError
from shoal_lab.bench.generator import Amount
from shoal_lab.bench.load import Load
from shoal_lab.bench.mix import Slo, parse_mix
from shoal_lab.bench.workload import PromptKind, Workload

MIX = parse_mix("101:11", Slo(300, 100))
CONFIG = ShoalConfig(handoff=SHIP_ALL)
FLEETS = tuple(Fleet(num_prefill, num_decode, skip) for skip in (0, 10) for num_prefill, num_decode in ratios(3))


def options(**fields: object) -> PlanOptions:
    known = {
        "costs": COSTS, "config": CONFIG, "fleets": FLEETS, "mix": MIX, "loads": (),
        "amount": Amount(4, num_requests=60), "seed": 5,
    }  # fmt: skip
    return PlanOptions(**(known | fields))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(options(), lambda *_: None)


def test_the_best_fleet_has_the_highest_goodput_and_each_was_seen_to_fail(plan: Plan):
    assert len(plan.outcomes) == len(FLEETS)
    assert plan.best.goodput == max(one.goodput for one in plan.outcomes) > 0
    for one in plan.outcomes:
        assert one.is_saturated
        rates = {level.level.load.value: level.level.holds for level in one.levels}
        assert rates[one.goodput] and not any(holds for rate, holds in rates.items() if rate > one.goodput)
        assert all(level.level.records == () for level in one.levels)


def test_no_fleet_bears_more_than_pools_without_queues_would(plan: Plan):
    """Steadily, that is: the last requests of a short load may find an empty house."""
    lasting = make_plan(options(amount=Amount(20, num_requests=800), fleets=FLEETS[:1]), lambda *_: None)
    for one in lasting.outcomes:
        assert one.goodput <= 1.05 * bound(one.fleet, COSTS, CONFIG, MIX).overall


def known_plan(*goodputs: tuple[Fleet, float]) -> Plan:
    outcomes = tuple(Outcome(fleet, (), goodput, is_saturated=True) for fleet, goodput in goodputs)
    return Plan("a machine", "a model", MIX, Amount(4), 5, 0.9, outcomes)


@pytest.mark.parametrize(
    ("goodputs", "best"),
    [
        ([(Fleet(1, 1, 10), 8.0), (Fleet(1, 1, 5), 7.0), (Fleet(1, 1, 0), 6.99)], Fleet(1, 1, 5)),
        ([(Fleet(2, 2, 0), 8.0), (Fleet(1, 1, 0), 7.5), (Fleet(2, 1, 0), 7.9)], Fleet(1, 1, 0)),
        ([(Fleet(2, 2, 0), 7.5), (Fleet(1, 1, 5), 8.0)], Fleet(2, 2, 0)),
        ([(Fleet(1, 3, 0), 7.5), (Fleet(2, 2, 0), 8.0), (Fleet(3, 1, 0), 7.0)], Fleet(2, 2, 0)),
        ([(Fleet(1, 3, 5), 0.0), (Fleet(2, 2, 0), 0.0)], Fleet(2, 2, 0)),
    ],
)
def test_of_fleets_that_the_search_can_not_tell_apart_the_best_skips_least_and_is_the_smallest(
    goodputs: list[tuple[Fleet, float]], best: Fleet
):
    assert known_plan(*goodputs).best.fleet == best


def test_a_plan_is_the_same_digit_by_digit_and_survives_its_file(plan: Plan):
    again = make_plan(options(), lambda *_: None)
    assert again.to_json() == plan.to_json()


def test_requests_are_those_that_a_benchmark_sends():
    mix = parse_mix("10-90:3-30:1,200:5:2", Slo(300, 100))
    planned = planned_requests(options(mix=mix), Load(rate=4.0))
    sent = Workload(mix, prompts=PromptKind.IDS, token_ids=(1000, 30_000), seed=5)
    assert [one.arrival_s for one in planned] == sent.arrivals(4.0, 64)
    for index, one in enumerate(planned):
        real = sent.request(Load(rate=4.0), index)
        assert (one.kind, one.prompt_tokens, one.max_tokens) == (real.kind, real.prompt_tokens, real.max_tokens)
        assert one.is_counted == (index >= 4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"fleets": (Fleet(1, 0, 0),)}, "must be a decode replica"),
        ({"fleets": (Fleet(1, 1, 7),)}, "nothing of 7 skipped"),
        ({"fleets": (Fleet(1, 1, 0, is_shared=True),), "costs": costs(sharing=None)}, "leave out --shared"),
        (
            {"config": ShoalConfig(handoff=SHIP_ALL, decode=StageConfig(num_blocks=4))},
            "doesn't fit decode's pool of 64",
        ),
        ({"config": ShoalConfig(handoff=SHIP_ALL, prefill=StageConfig(num_blocks=1))}, "doesn't fit prefill's pool"),
        ({"config": ShoalConfig(handoff=SHIP_ALL, decode=StageConfig(kv_pool_bytes=1000))}, "holds no block"),
    ],
)
def test_what_can_not_be_simulated_is_said_first(fields: dict[str, object], says: str):
    with pytest.raises(ConfigError, match=says):
        make_plan(options(**fields), lambda *_: None)


def test_the_page_and_the_lines_have_every_fleet(plan: Plan):
    page, lines = render_plan(plan, COSTS), summarize_plan(plan)
    assert page.count("<svg") == 1 and plan.best.fleet.name in page and "A plan for a model" in page
    for one in plan.outcomes:
        fleet = one.fleet
        wanted = [str(fleet.num_prefill), str(fleet.num_decode), str(fleet.skip_layers), f"{one.goodput:.3g}"]
        assert any(line.split()[:4] == wanted for line in lines)
    assert lines[-1] == f"Best: {plan.best.fleet.name}, goodput {plan.best.goodput:.3g} requests/s."


def test_what_keeps_figures_from_meaning_what_they_seem_to_is_shown(plan: Plan):
    """Each load has 60 requests, so few that p99 is near their maximum."""
    [warning] = [line for line in summarize_plan(plan) if line.startswith("warning: ")]
    num_others = len(plan.best.levels) + len(plan.outcomes) - 1 - 1
    first = plan.outcomes[0].fleet.name
    assert warning.startswith(f"warning: {first}, at ") and f" (and {num_others} more): 60 requests" in warning
    assert f"Beware: {warning.removeprefix('warning: ')}" in render_plan(plan, COSTS)
    enough = make_plan(
        options(amount=Amount(4, num_requests=100), fleets=FLEETS[:1], loads=(Load(rate=1.0),)), lambda *_: None
    )
    assert not any(line.startswith("warning") for line in summarize_plan(enough))


def test_no_goodput_is_said():
    mix = parse_mix("101:11", Slo(0.001, 0.001))
    found = make_plan(options(mix=mix, fleets=FLEETS[:1], loads=(Load(rate=1.0),)), lambda *_: None)
    assert "Goodput: none" in summarize_plan(found)[-1]


def test_fleets_are_every_ratio_with_every_skip_count():
    found = parse_fleets(COSTS, None, "1:3, 0:2", None, Routing.SHORTEST, is_shared=False)
    assert [(one.num_prefill, one.num_decode, one.skip_layers) for one in found] == [
        (1, 3, 0), (0, 2, 0), (1, 3, 10), (0, 2, 10),
    ]  # fmt: skip
    assert len(parse_fleets(COSTS, 4, None, "10", Routing.SHORTEST, is_shared=False)) == 3


APP = typer.Typer()
APP.command()(simulate)


def typed(*arguments: str) -> str:
    """What the command printed; raises what it raised."""
    done = CliRunner().invoke(APP, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def costs_file(tmp_path: Path) -> str:
    path = tmp_path / "costs.json"
    path.write_text(COSTS.to_json())
    return str(path)


def test_the_command_leaves_a_file_and_a_page_and_says_the_best(costs_file: str, tmp_path: Path):
    output = tmp_path / "deep" / "out"
    said = typed(
        costs_file, "--replicas", "3", "--rate", "2,1", "--num-requests", "20", "--mix", "101:5",
        "--skip-layers", "10", "--output", str(output),
    )  # fmt: skip
    assert {path.name for path in output.iterdir()} == {"simulation.json", "report.html"}
    document = json.loads((output / "simulation.json").read_text())
    assert [one["goodput"] for one in document["outcomes"]] == [2.0, 2.0]
    assert "goodput 2 requests/s or more" in said and str(output / "report.html") in said.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--replicas tries all"),
        (("--replicas", "2", "--ratio", "1:1"), "--replicas tries all"),
        (("--ratio", "1:0"), "prefill:decode"),
        (("--replicas", "2", "--skip-layers", "1,,2"), "--skip-layers"),
        (("--replicas", "2", "--duration-s", "1", "--num-requests", "1"), "leave one of them out"),
        (("--replicas", "2", "--config", "none.yaml"), "can't read the configuration"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_error_is_a_sentence_that_says_what_to_do(
    arguments: tuple[str, ...], says: str, costs_file: str, tmp_path: Path
):
    with pytest.raises(ConfigError, match=says):
        typed(costs_file, *arguments, "--output", str(tmp_path / "out"))


def test_a_folder_that_nobody_may_write_to_is_told_before_anything_is_simulated(
    costs_file: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("simulation.commands.make_plan", None)
    with pytest.raises(ConfigError, match="choose another --output"):
        typed(costs_file, "--replicas", "2", "--output", "/proc/self")


def test_the_bound_gives_short_prompts_to_decode():
    """101 tokens are not worth a hand-off of 102 at least: prefill has nothing to do, and decode all of it."""
    fleet, local = FLEETS[0], ShoalConfig(handoff=HandoffConfig(min_tokens=102))
    shipped, own = (bound(fleet, COSTS, config, MIX) for config in (CONFIG, local))
    assert own.prefill == float("inf")
    more_s = fleet.num_decode * (1 / own.decode - 1 / shipped.decode)
    assert more_s == pytest.approx(100 * COSTS.of_skip(0).token_s), "in steps that it takes anyway"
    lasting = make_plan(options(config=local, amount=Amount(20, num_requests=800), fleets=FLEETS[:1]), lambda *_: None)
    assert lasting.outcomes[0].goodput <= 1.05 * own.overall
