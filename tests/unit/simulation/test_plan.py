"""The best ratio and skip count, what is said of it, and the command as people meet it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import typer
from simulate import simulate
from simulation import traffic as traffic_module
from simulation.bound import bound
from simulation.commands import parse_counts, parse_fleets
from simulation.costs import DecodeCost
from simulation.plan import Outcome, Plan, PlanOptions, make_plan, planned_requests, ratios
from simulation.plan_page import aligned, render_plan, sizes, summarize_plan
from simulation.routing import Routing
from simulation.system import Fleet
from simulation.traffic import Work, traffic
from simulations import COSTS, SHIP_ALL, costs, free
from typer.testing import CliRunner

from shoal.cluster import directory, graph
from shoal.cluster.directory import Entry, LivingPool
from shoal.config import HandoffConfig, ShoalConfig, StageConfig
from shoal.errors import ConfigError
from shoal.handoff import session
from shoal_lab.bench.generator import Amount
from shoal_lab.bench.load import Load
from shoal_lab.bench.mix import Slo, parse_mix
from shoal_lab.bench.workload import PromptKind, Workload

MIX = parse_mix("101:11", Slo(300, 100))
CONFIG = ShoalConfig(handoff=SHIP_ALL)
INLINE = ShoalConfig(handoff=SHIP_ALL.model_copy(update={"carrier": "inline"}))
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


def test_fewer_layers_bear_at_least_as_much(plan: Plan):
    by_fleet = {(one.fleet.num_prefill, one.fleet.skip_layers): one.goodput for one in plan.outcomes}
    assert by_fleet[1, 10] >= by_fleet[1, 0]


def test_equal_goodput_prefers_the_plan_that_skips_less():
    known = free(
        prefill=tuple(one.model_copy(update={"step_s": 0.0, "token_s": 0.0}) for one in COSTS.prefill),
        decode=DecodeCost(step_s=0.01, sequence_s=0.0, context_token_s=0.0),
    )
    found = make_plan(options(costs=known, fleets=(Fleet(1, 1, 10), Fleet(1, 1, 0)), loads=(Load(rate=1.0),)), print)
    assert [one.goodput for one in found.outcomes] == [1.0, 1.0] and found.best.fleet.skip_layers == 0


def known_plan(*goodputs: tuple[Fleet, float]) -> Plan:
    outcomes = tuple(Outcome(fleet, (), goodput, is_saturated=True) for fleet, goodput in goodputs)
    return Plan("a machine", "a model", "measured", MIX, Amount(4), 5, 0.9, outcomes)


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
    assert Plan.from_json(plan.to_json()) == plan


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


def test_prefill_s_pool_need_not_hold_the_answer():
    tight = ShoalConfig(handoff=SHIP_ALL, prefill=StageConfig(num_blocks=7))  # 112 tokens
    mix = parse_mix("101:30", Slo(300, 100))
    found = make_plan(options(config=tight, mix=mix, fleets=FLEETS[:1], loads=(Load(rate=1.0),)), lambda *_: None)
    assert found.best.goodput == 1.0


def test_the_page_and_the_lines_have_every_fleet_and_size(plan: Plan):
    sized = sizes(plan, COSTS, CONFIG, [30])
    page, lines = render_plan(plan, COSTS, sized), summarize_plan(plan, sized)
    assert page.count("<svg") == 1 and plan.best.fleet.name in page and "A plan for a model" in page
    assert "3 in 1" in page and "30 in 1" in page and "30 in 10" in page
    for one in plan.outcomes:
        fleet = one.fleet
        wanted = [str(fleet.num_prefill), str(fleet.num_decode), str(fleet.skip_layers), f"{one.goodput:.3g}"]
        assert any(line.split()[:4] == wanted for line in lines)
    assert lines[-1] == f"Best: {plan.best.fleet.name}, goodput {plan.best.goodput:.3g} requests/s."
    assert "arithmetic" not in lines[-2]


def test_what_keeps_figures_from_meaning_what_they_seem_to_is_shown(plan: Plan):
    """Each load has 60 requests, so few that p99 is near their maximum."""
    [warning] = [line for line in summarize_plan(plan, []) if line.startswith("warning: ")]
    num_others = len(plan.best.levels) + len(plan.outcomes) - 1 - 1
    first = plan.outcomes[0].fleet.name
    assert warning.startswith(f"warning: {first}, at ") and f" (and {num_others} more): 60 requests" in warning
    assert f"Beware: {warning.removeprefix('warning: ')}" in render_plan(plan, COSTS, [])
    enough = make_plan(
        options(amount=Amount(4, num_requests=100), fleets=FLEETS[:1], loads=(Load(rate=1.0),)), lambda *_: None
    )
    assert not any(line.startswith("warning") for line in summarize_plan(enough, []))


def test_the_page_says_which_fleets_count_as_equal(plan: Plan):
    assert "within an eighth of the highest one count as equal" in render_plan(plan, COSTS, [])


@pytest.mark.parametrize("fleet", [Fleet(1, 1, 0), Fleet(1, 2, 0), Fleet(3, 5, 0), Fleet(0, 2, 0)])
def test_a_row_of_a_size_has_as_many_replicas_as_it_says(fleet: Fleet):
    found = make_plan(options(fleets=(fleet,), loads=(Load(rate=1.0),)), lambda *_: None)
    totals = [2, 5, 31, 100]
    as_it_is, *rows = sizes(found, COSTS, CONFIG, totals)
    for one in (as_it_is, *rows):
        assert one.num_replicas == one.num_applications * (one.work.num_prefill + one.work.num_decode)
    assert as_it_is.num_replicas == fleet.num_replicas and [one.num_replicas for one in rows[::2]] == totals
    for wanted, one in zip(totals, rows[1::2], strict=True):
        assert one.work == as_it_is.work
        assert abs(one.num_replicas - wanted) <= fleet.num_replicas / 2 or one.num_applications == 1


def test_arithmetic_is_called_so():
    known = costs(origin="arithmetic")
    found = make_plan(options(costs=known, fleets=FLEETS[:1], loads=(Load(rate=1.0),)), lambda *_: None)
    assert any("nothing here was measured" in line for line in summarize_plan(found, []))
    assert "or more" in summarize_plan(found, [])[-1]


def test_no_goodput_is_said_and_has_no_traffic():
    mix = parse_mix("101:11", Slo(0.001, 0.001))
    found = make_plan(options(mix=mix, fleets=FLEETS[:1], loads=(Load(rate=1.0),)), lambda *_: None)
    assert sizes(found, COSTS, CONFIG, [30]) == []
    assert "Goodput: none" in summarize_plan(found, [])[-1]


def test_traffic_is_counted_by_the_rules_of_the_code():
    work = Work(
        num_prefill=2, num_decode=3, requests_per_s=10, prompt_tokens=101, output_tokens=11, decode_steps_per_s=50
    )
    found = traffic(work, COSTS, INLINE)
    assert found.wire_bytes == 10 * 100 * 20_000
    assert (found.wire_bytes_out, found.wire_bytes_into) == (found.wire_bytes / 2, found.wire_bytes / 3)
    assert found.frames == 10 * (5 + 2 * 2)  # 2 MB are two frames of 1 MiB, each with its credit
    assert traffic(work, COSTS, CONFIG).frames == 10 * (5 + 2)  # or one slot of shared memory
    assert found.num_sessions == 6 and found.beats == pytest.approx(6 * 2 * 3 / 5)
    assert found.beats_into_decode == pytest.approx(2 * 3 / 5)
    assert found.handle_calls == 20 and found.token_messages == 50
    assert found.serving_cores == pytest.approx(10 * 0.005 + 50 * 0.001 + 110 * 0.0001)
    assert found.num_ray_entries == 6 and found.ray_reads == (3 + 1) * 3 and found.health_checks == 6
    assert found.ray_entries_read == 3 * 2 + 1 * 3
    alone = traffic(Work(0, 3, 10, 101, 11, 50), COSTS, CONFIG)
    assert alone.wire_bytes == alone.frames == alone.num_sessions == alone.beats == 0 and alone.handle_calls == 10


def test_only_what_is_handed_off_is_traffic_between_the_pools():
    a_quarter = replace(Work(2, 3, 10, 101, 11, 50), handed_off=0.25)
    found = traffic(a_quarter, COSTS, INLINE)
    assert found.wire_bytes == 2.5 * 100 * 20_000 and found.frames == 2.5 * (5 + 2 * 2)
    assert (found.wire_bytes_out, found.wire_bytes_into) == (found.wire_bytes / 2, found.wire_bytes / 3)
    assert found.handle_calls == 10 + 2.5 and found.token_messages == 50


@pytest.mark.parametrize(
    ("min_tokens", "handed_off", "prompt_tokens"),
    [
        (2, 1.0, (3 * 101 + 349.5) / 4),
        (102, 1 / 4, 349.5),
        (350, 1 / 8, 374.5),
        (399, 1 / 400, 399),
        (400, 0.0, 0.0),
    ],
)
def test_prompts_that_are_not_worth_it_are_not_handed_off(min_tokens: int, handed_off: float, prompt_tokens: float):
    mix, config = parse_mix("101:5:3,300-399:5:1", Slo(300, 100)), ShoalConfig(handoff={"min_tokens": min_tokens})
    found = make_plan(options(mix=mix, config=config, fleets=FLEETS[:1], loads=(Load(rate=1.0),)), lambda *_: None)
    [one] = sizes(found, COSTS, config, [])
    assert (one.work.handed_off, one.work.prompt_tokens) == pytest.approx((handed_off, prompt_tokens))
    assert one.traffic.wire_bytes == pytest.approx(handed_off * max(0, prompt_tokens - 1) * 20_000)
    assert one.traffic.handle_calls == pytest.approx(1 + handed_off)


def test_traffic_follows_the_code_that_it_is_taken_from():
    assert traffic_module.BEATS_PER_TTL == session._BEATS_PER_TTL
    assert traffic_module.ASKED_EVERY_S == LivingPool.BELIEVED_S
    deployment = graph._deployment(object, "a", ShoalConfig(), {})
    assert deployment._deployment_config.health_check_period_s == traffic_module.HEALTH_CHECK_PERIOD_S


@pytest.mark.parametrize("num_replicas", [0, 1, 50])
def test_a_listing_asks_ray_s_head_as_often_however_many_there_are(monkeypatch: pytest.MonkeyPatch, num_replicas: int):
    entries = {
        f"a/entry/prefill/{index}".encode(): json.dumps(
            asdict(Entry("a", "prefill", str(index), f"actor {index}", "node", 1, "host:1"))
        ).encode()
        for index in range(num_replicas)
    }
    asked: list[str] = []

    class Store:
        def internal_kv_multi_get(self, keys: list[bytes], namespace: bytes) -> dict[bytes, bytes]:
            asked.append("entries")
            return {key: entries[key] for key in keys}

    def keys(prefix: str, namespace: str) -> list[bytes]:
        asked.append("keys")
        return [key for key in entries if key.startswith(prefix.encode())]

    def names(all_namespaces: bool) -> list[dict[str, str]]:
        asked.append("names")
        return [{"name": f"actor {index}"} for index in range(num_replicas)]

    monkeypatch.setattr(directory.internal_kv, "_internal_kv_list", keys)
    monkeypatch.setattr(directory.internal_kv, "internal_kv_get_gcs_client", Store)
    monkeypatch.setattr(directory.ray.util, "list_named_actors", names)
    assert len(directory.living("a", "prefill")) == num_replicas
    assert len(asked) == (traffic_module.READS_PER_LISTING if num_replicas else 2)


def test_columns_are_aligned():
    assert aligned(("a", "bb"), [("1", "2"), ("10", "200")]) == [" a   bb", " 1    2", "10  200"]


def test_ratios_have_one_of_each_at_least():
    assert ratios(4) == [(1, 3), (2, 2), (3, 1)]
    with pytest.raises(ConfigError, match="--replicas is 1"):
        ratios(1)


def test_fleets_are_every_ratio_with_every_skip_count():
    found = parse_fleets(COSTS, None, "1:3, 0:2", None, Routing.SHORTEST, is_shared=False)
    assert [(one.num_prefill, one.num_decode, one.skip_layers) for one in found] == [
        (1, 3, 0), (0, 2, 0), (1, 3, 10), (0, 2, 10),
    ]  # fmt: skip
    assert len(parse_fleets(COSTS, 4, None, "10", Routing.SHORTEST, is_shared=False)) == 3


@pytest.mark.parametrize("text", ["", "1.5", "a", "1,,2", "-1"])
def test_counts_are_whole_numbers(text: str):
    assert parse_counts("8,2, 8", "--scale", least=2) == [2, 8]
    with pytest.raises(ConfigError, match="--scale"):
        parse_counts(text, "--scale", least=0)


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
        costs_file, "--replicas", "3", "--rate", "2,1", "--num-requests", "20", "--mix", "101:5", "--scale", "30",
        "--skip-layers", "10", "--output", str(output),
    )  # fmt: skip
    assert {path.name for path in output.iterdir()} == {"simulation.json", "report.html"}
    document = json.loads((output / "simulation.json").read_text())
    assert [one["goodput"] for one in document["outcomes"]] == [2.0, 2.0]
    assert "goodput 2 requests/s or more" in said and str(output / "report.html") in said.replace("\n", "")
    assert "30" in said and "sessions" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--replicas tries all"),
        (("--replicas", "2", "--ratio", "1:1"), "--replicas tries all"),
        (("--ratio", "1:0"), "prefill:decode"),
        (("--ratio", "1-1"), "prefill:decode"),
        (("--replicas", "2", "--skip-layers", "x"), "--skip-layers"),
        (("--replicas", "2", "--rate", "fast"), "requests a second"),
        (("--replicas", "2", "--mix", "100"), "prompt:output"),
        (("--replicas", "2", "--scale", "1"), "--scale"),
        (("--replicas", "2", "--duration-s", "1", "--num-requests", "1"), "leave one of them out"),
        (("--replicas", "2", "--duration-s", "inf"), "--duration-s must be more than 0, and finite"),
        (("--replicas", "2", "--slo-tpot-ms", "inf"), "more than 0, and finite"),
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


def test_help_teaches():
    said = " ".join(typed("--help").split())
    assert "step_costs.py" in said and "90 % of requests" in said and "--scale" in said


def test_the_bound_gives_short_prompts_to_decode():
    """101 tokens are not worth a hand-off of 102 at least: prefill has nothing to do, and decode all of it."""
    fleet, local = FLEETS[0], ShoalConfig(handoff=HandoffConfig(min_tokens=102))
    shipped, own = (bound(fleet, COSTS, config, MIX) for config in (CONFIG, local))
    assert own.prefill == float("inf")
    more_s = fleet.num_decode * (1 / own.decode - 1 / shipped.decode)
    assert more_s == pytest.approx(100 * COSTS.of_skip(0).token_s), "in steps that it takes anyway"
    lasting = make_plan(options(config=local, amount=Amount(20, num_requests=800), fleets=FLEETS[:1]), lambda *_: None)
    assert lasting.outcomes[0].goodput <= 1.05 * own.overall


def test_however_small_an_application_is_each_pool_that_it_has_keeps_a_replica():
    small = Work(3, 1, 10, 101, 11, 50).times(0.1)
    assert (small.num_prefill, small.num_decode) == (1, 1)
    assert traffic(small, COSTS, CONFIG).wire_bytes_into > 0
    assert Work(0, 3, 10, 101, 11, 50).times(0.1).num_prefill == 0
