"""The arithmetic of the neighbours' table on timelines that can be reckoned by hand, what each load
asks, and raw data to table and plots."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import neighbours, neighbours_report, scale
from benchmarks import neighbours_figures as figures
from benchmarks import neighbours_loads as loads
from benchmarks.metrics import Reply, Spread
from benchmarks.neighbours_loads import Part, Parts, Turn
from benchmarks.neighbours_report import Row
from benchmarks.workload import FIRST_TOKEN, Request

LONG, SHORT = "rank8-0", "rank8-1"
MACHINE = {
    "when": "2026-01-01T00:00:00+00:00",
    "cpu": "Some CPU",
    "cores": 2,
    "flags": ["avx2"],
    "memory_gib": 8.0,
    "load_before": 0.1,
    "commit": "0123456789abcdef",
    "changed_files": 3,
}


def reply(
    times: Sequence[float],
    adapter: str | None = None,
    due: float = 0,
    prompt: int = 10,
    **more: Any,
) -> Reply:
    return Reply(0, adapter, prompt, len(times), due, due, tuple(times), **more)


def part(*replies: Reply, begin: float = 0, end: float = 10) -> Part:
    return Part(begin, end, replies)


# Arithmetic --------------------------------------------------------------------------------


def test_tokens_count_in_their_time_only() -> None:
    assert part(reply([1, 2, 3, 4, 5]), begin=1, end=4).tokens_s == pytest.approx(3 / 3)


def test_service_is_the_prompt_at_the_first_token_and_every_token() -> None:
    part_ = part(reply([1, 2], LONG, prompt=5), reply([3], SHORT), reply([], LONG), end=2)
    assert figures.service(part_, LONG) == [(1, 2), (1, 5), (2, 2)]
    assert figures.service(part_, SHORT) == []  # came after the end


def test_the_gap_is_of_any_interval() -> None:
    one, other = [(1.0, 10.0), (4.0, 10.0)], [(2.0, 30.0)]
    # 0, +10, −20, −10: from the highest to the lowest.
    assert figures.gap(one, other, 1, 1) == 30
    # 0, +10, 0, +10.
    assert figures.gap(one, other, 1, 3) == 10
    assert figures.gap([], [], 1, 1) == 0


def test_what_comes_at_one_time_makes_no_gap() -> None:
    assert figures.gap([(1.0, 50.0)], [(1.0, 50.0)], 1, 1) == 0


def test_the_bound() -> None:
    # 8 seats × (256 + 64 tokens) is the fullest batch, and a token of output counts twice.
    assert figures.bound() == 2 * 2 * 8 * 320


def test_jain() -> None:
    assert figures.jain([3, 3]) == pytest.approx(1)
    assert figures.jain([1, 0]) == pytest.approx(0.5)
    assert figures.jain([1, 3]) == pytest.approx(16 / 20)
    assert figures.jain([0, 0]) == 0


def test_an_lru_loses_what_was_used_longest_ago() -> None:
    lru = figures.Lru(32)
    assert all(lru.misses(i) for i in range(32))
    assert not lru.misses(0)  # used again: now 1 is the oldest
    assert lru.misses(32)
    assert not lru.misses(0)
    assert lru.misses(1)


def test_percentiles_are_scaled_and_left_out_without_values() -> None:
    assert figures.percentile("p", [1, 2, 3], 50, 1e3) == {"p": 2000}
    assert figures.percentile("p", [1, 2], 99)["p"] == pytest.approx(1.99)
    assert figures.percentile("p", [], 50) == {}


def test_the_drain_is_the_longest_reply_or_the_longest_output_at_the_median_pace() -> None:
    replies = [reply([1, 1.1, 1.2, 1.3]), reply([1, 3])]
    assert figures.at_median_pace(replies) == pytest.approx(4 * 0.1)
    assert figures.longest(replies) == 2
    assert figures.at_median_pace([reply([1])]) is None
    assert figures.longest([]) is None


# Figures of cases --------------------------------------------------------------------------


def test_flood() -> None:
    parts = {
        "alone": part(reply([2, 3])),
        "flood": part(reply([1, 1.5, 2, 2.5])),
        "base": part(reply([7], due=2)),
        "third": part(reply([8], due=6)),
    }
    (found,) = figures.of("flood", [parts], True)
    assert found["third_s"] == pytest.approx(2)
    assert found["tokens_s"] == pytest.approx(0.4)
    assert found["of_bound"] == pytest.approx(5 / (1.5 * 2 + 1.5))
    assert found["of_pace_bound"] == pytest.approx(5 / (1.5 * 2 + 4 * 0.5))
    assert found["failed"] == 0


def test_a_victim_without_a_reply_has_no_figure_and_is_a_failure() -> None:
    parts = {
        "alone": part(reply([2, 3])),
        "flood": part(reply([1, 2])),
        "victims": part(reply([], error="503")),
    }
    (found,) = figures.of("six", [parts], True)
    assert found["failed"] == 1
    assert not {"p99_s", "of_bound", "of_pace_bound"} & found.keys()


def test_bystanders() -> None:
    parts = {
        "quiet": part(reply([0.1, 0.9, 1.1, 1.2, 1.3, 1.4]), begin=0.15),
        "disturbed": part(reply([0.1, 0.9, 1, 1.1, 1.2, 1.6])),
        "loads": part(reply([2], load_ms=30.0), reply([3], load_ms=0.0)),
    }
    (found,) = figures.of("bystanders", [parts], True)
    assert found["of_median"] == pytest.approx(4)
    assert found["longest_ms"] == pytest.approx(400)
    assert found["of_quiet"] == pytest.approx(np.percentile([0.1, 0.1, 0.4], 99) / 0.1)
    assert (found["loads"], found["loaded"]) == (2, 0.5)


def test_shares() -> None:
    parts = {"all": part(reply([1, 2], LONG, prompt=8), reply([3], SHORT, prompt=10))}
    (found,) = figures.of("shares", [parts], True)
    assert (found["share_0"], found["share_1"]) == (12, 12)
    assert found["gap_1:1"] == 12
    assert found["jain_1:1"] == pytest.approx(1)
    # Weights 1 and 3: 12 and 4.
    assert found["jain_1:3"] == pytest.approx(16**2 / (2 * (12**2 + 4**2)))
    assert found["of_bound_1:1"] == pytest.approx(12 / figures.bound())


def test_fifty_is_held_against_one() -> None:
    parts = {"fifty": part(reply([1, 2, 3])), "one": part(reply([1, 2, 3, 4]))}
    (found,) = figures.of("fifty", [parts], True)
    assert found["of_one"] == pytest.approx(0.75)


def test_cold_is_what_the_server_says() -> None:
    cold, warm = reply([3], "a", load_ms=12.0), reply([1], "a", load_ms=0.0)
    (found,) = figures.of("thousand", [{"alpha 1": part(cold, warm)}], True)
    assert found["alpha 1 cold_p50_s"] == 3
    assert found["alpha 1 warm_p50_s"] == 1
    assert found["alpha 1 hits"] == 0.5


def test_a_server_that_should_say_and_does_not_has_no_hit_rate() -> None:
    (found,) = figures.of("thousand", [{"alpha 1": part(reply([1], "a"))}], True)
    assert "alpha 1 hits" not in found
    assert not [key for key in found if "warm" in key]


def test_cold_is_inferred_from_the_order_of_sending_where_the_server_says_nothing() -> None:
    later, first = reply([9], "a", due=5), reply([2], "a", due=1)
    turns: list[Parts] = [{"alpha 1": part(later, first)}, {"alpha 1": part(reply([1], "a"))}]
    found = figures.of("thousand", turns, False)
    assert found[0]["alpha 1 cold_p50_s"] == 1  # the one sent first
    assert found[0]["alpha 1 warm_p50_s"] == 4
    assert found[1]["alpha 1 hits"] == 1  # it is held from turn to turn


def test_a_failed_request_is_neither_cold_nor_warm() -> None:
    parts = {"alpha 1": part(reply([], "a", error="500"), reply([1], "a"))}
    (found,) = figures.of("thousand", [parts], False)
    assert found["alpha 1 hits"] == 1
    assert found["failed"] == 1


# Loads -------------------------------------------------------------------------------------


class Answers:
    """A server that takes `step_s` for a token; `refuses` is the adapter that it refuses."""

    def __init__(self, step_s: float = 0.001, refuses: str | None = None) -> None:
        self.step_s = step_s
        self.refuses = refuses
        self.asked: list[Request] = []
        self._began = asyncio.get_running_loop().time()

    def now(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    async def ask(self, request: Request) -> Reply:
        if request.due_s is not None:
            await asyncio.sleep(request.due_s - self.now())
        self.asked.append(request)
        sent = self.now()
        times = []
        if request.adapter is None or request.adapter != self.refuses:
            await asyncio.sleep(self.step_s * request.output)
            times = np.linspace(sent, self.now(), request.output + 1)[1:].tolist()
        return Reply(
            request.stream,
            request.adapter,
            len(request.prompt),
            request.output,
            sent if request.due_s is None else request.due_s,
            sent,
            tuple(times),
            None if times else "404",
        )

    async def in_turn(self, requests: Sequence[Request]) -> list[Reply]:
        return [await self.ask(request) for request in requests]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLOOD_S", "SHARES_S", "MANY_S", "THOUSAND_S", "ALONE_S"):
        monkeypatch.setattr(loads, name, 0.15)
    monkeypatch.setattr(loads, "THIRD_AT_S", 0.03)
    monkeypatch.setattr(loads, "BASE_AT_S", (0.04, 0.08, 0.12))
    monkeypatch.setattr(loads, "DECODED", 150)
    monkeypatch.setattr(loads, "LOAD_EVERY_S", 0.03)
    monkeypatch.setattr(loads, "AFTER_FAILURE_S", 0.05)


async def done(case: str, round_: int = 0, **more: Any) -> tuple[Parts, Answers]:
    server = Answers(**more)
    return await loads.LOADS[case](Turn(server, case, round_)), server


@pytest.mark.usefixtures("quick")
async def test_prompts_are_random_tokens_that_no_two_requests_share() -> None:
    for case in loads.LOADS:
        _, server = await done(case)
        prompts = [request.prompt[:16] for request in server.asked]
        assert len(set(prompts)) == len(prompts), case
        assert min(map(min, prompts)) >= FIRST_TOKEN


@pytest.mark.usefixtures("quick")
async def test_every_server_is_asked_the_same_and_no_two_rounds_are_alike() -> None:
    def firsts(server: Answers) -> dict[int, Request]:
        found: dict[int, Request] = {}
        for request in server.asked:
            found.setdefault(request.stream, request.model_copy(update={"due_s": None}))
        return found

    for case in loads.LOADS:
        one, other = await done(case), await done(case, step_s=0.002)
        # A slower server may be asked for longer.
        both = firsts(one[1]).keys() & firsts(other[1]).keys()
        assert len(both) > 1
        assert [n for n in both if firsts(one[1])[n] != firsts(other[1])[n]] == [], case
        later = firsts((await done(case, round_=1))[1])
        both &= later.keys()
        assert [n for n in both if later[n].prompt == firsts(one[1])[n].prompt] == [], case


async def test_victims_come_when_a_flood_has_been_going_on_for_a_while() -> None:
    assert loads._third_at(Turn(Answers(), "flood", 0)) == 5
    assert loads._third_at(Turn(Answers(), "flood", loads.WARM_UP)) == 1


@pytest.mark.usefixtures("quick")
async def test_the_flood_and_its_victims() -> None:
    parts, _ = await done("flood")
    assert {r.adapter for r in parts["flood"].replies} == {LONG, SHORT}
    assert len({r.stream for r in parts["flood"].replies}) == 8
    assert all(32 <= r.prompt <= 256 and 16 <= r.output <= 64 for r in parts["flood"].replies)
    assert [(r.adapter, r.prompt, r.output) for r in parts["third"].replies] == [
        ("rank8-2", 64, 16)
    ]
    assert [r.adapter for r in parts["base"].replies] == [None] * 3
    begin = parts["flood"].begin_s
    assert parts["third"].replies[0].due_s - begin == pytest.approx(0.03, abs=0.02)


@pytest.mark.usefixtures("quick")
async def test_six_victims_come_one_after_the_other() -> None:
    parts, _ = await done("six")
    victims = parts["victims"].replies
    assert len({r.adapter for r in victims} - {LONG, SHORT, "rank8-2"}) == 6
    assert all(b.sent_s >= a.times[-1] for a, b in pairwise(victims))
    assert {r.adapter for r in parts["alone"].replies} == {r.adapter for r in victims}
    assert max(r.times[-1] for r in parts["alone"].replies) <= parts["flood"].begin_s


@pytest.mark.usefixtures("quick")
async def test_a_flood_ends_when_its_victims_were_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "FLOOD_S", 60)
    parts, _ = await done("six")
    assert parts["flood"].end_s == parts["victims"].end_s
    last = max(r.sent_s for r in parts["flood"].replies)
    assert last <= parts["victims"].end_s + 0.05


@pytest.mark.usefixtures("quick")
async def test_adapters_go_round_while_bystanders_decode() -> None:
    parts, server = await done("bystanders")
    loaded = [r.adapter for r in parts["loads"].replies]
    assert loaded == [f"rank64-{i % 8}" for i in range(len(loaded))]
    assert len(loaded) >= 3
    assert all(r.output == 1 for r in parts["loads"].replies)
    last = max(r.times[-1] for r in parts["disturbed"].replies)
    assert max(r.sent_s for r in parts["loads"].replies) <= last + loads.LOAD_EVERY_S
    assert sum(request.output == 150 for request in server.asked) == 8


@pytest.mark.usefixtures("quick")
async def test_loads_do_not_pile_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "LOADS_MOST", 2)
    parts, _ = await done("bystanders")
    assert len(parts["loads"].replies) == 2


@pytest.mark.usefixtures("quick")
async def test_both_backlogged_adapters_always_wait() -> None:
    parts, _ = await done("shares")
    replies = parts["all"].replies
    streams = Counter(adapter for adapter, _ in {(r.adapter, r.stream) for r in replies})
    assert streams == {LONG: 12, SHORT: 12}
    mean = {name: np.mean([r.prompt for r in replies if r.adapter == name]) for name in streams}
    assert mean[LONG] > 2 * mean[SHORT]
    for name in streams:  # and each has some of the other kind
        lengths = {r.prompt for r in replies if r.adapter == name}
        assert min(lengths) <= 48 and max(lengths) >= 128


@pytest.mark.usefixtures("quick")
async def test_popularities() -> None:
    fifty, _ = await done("fifty")
    assert len({r.adapter for r in fifty["fifty"].replies}) > 10
    assert {r.adapter for r in fifty["one"].replies} == {LONG}
    thousand, _ = await done("thousand")
    known = {scale.name(i) for i in range(1000)}
    few, many = (
        {r.adapter for r in thousand[f"alpha {alpha:g}"].replies} for alpha in loads.ALPHAS
    )
    assert few | many <= known
    assert len(few) < len(many)


def test_the_second_is_half_as_popular_as_the_first() -> None:
    random = np.random.default_rng(1)
    draw = loads._zipf(["a", "b", "c"])
    counts = Counter(draw(random)[0] for _ in range(6000))
    assert [counts[name] / 6000 for name in "abc"] == pytest.approx(
        [6 / 11, 3 / 11, 2 / 11], abs=0.03
    )


def test_a_power_law_prefers_low_numbers() -> None:
    random = np.random.default_rng(1)
    first = {scale.name(i) for i in range(10)}
    drawn = [loads._power(0.3)(random)[0] in first for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(0.01**0.3, abs=0.03)  # P(i < x·n) = x^α


@pytest.mark.usefixtures("quick")
async def test_who_is_refused_asks_again_but_not_at_once() -> None:
    parts, _ = await done("fifty", refuses=LONG)
    (found,) = figures.of("fifty", [parts], True)
    assert 0 < found["failed"] < 32 * 2 * 8
    assert found["tokens_s"] > 0


@pytest.mark.usefixtures("quick")
async def test_a_warm_up_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "WARM_UP_S", 0.1)
    parts, _ = await done("shares", round_=loads.WARM_UP)
    assert parts["all"].end_s - parts["all"].begin_s == pytest.approx(0.1)


# Servers -----------------------------------------------------------------------------------


def test_both_servers_have_the_same_limits() -> None:
    for group in neighbours.GROUPS:
        targets = {name: group.target(name, "float32") for name in group.servers}
        stock = targets.pop(neighbours.STOCK)
        assert stock.environment["VLLM_PLUGINS"] == "loraplex"
        for name, target in targets.items():
            own = (*group.servers[name], "--compile")
            common = target.flags[: len(target.flags) - len(own)]
            assert target.flags[len(common) :] == own
            assert stock.flags[1 : 1 + len(common)] == common
            assert target.adapters == stock.adapters
    assert sorted(neighbours.CASES) == sorted(loads.LOADS)


def test_weights_are_of_the_adapters_by_name() -> None:
    (group,) = (group for group in neighbours.GROUPS if "shares" in group.cases)
    assert group.servers["loraplex 1:3"] == ("--weights", f"{LONG}=1,{SHORT}=3")


def test_hosts_are_too_small_for_what_must_be_cold() -> None:
    first = neighbours.GROUPS[0]
    assert first.host < loads.VICTIMS
    assert first.host < loads.LOADED
    assert all(group.host >= group.slots for group in neighbours.GROUPS)


def test_the_thousand_are_taken_in_and_stock_is_told_where_they_are(
    tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "CACHE", tmp_path)
    monkeypatch.setattr(neighbours, "THOUSAND", 3)
    (group,) = (group for group in neighbours.GROUPS if group.thousand)
    filled = neighbours._Running(group, "float32", group.cases, base_folder, tmp_path)._filled()
    assert filled.parent.name == "f32"
    sealed = neighbours._sealed(filled)
    assert list(sealed) == [scale.name(i) for i in range(3)]
    for folder in sealed.values():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], sorted(config["target_modules"])) == (8, ["q_proj", "v_proj"])
    weights = {(folder / "adapter_model.safetensors").read_bytes() for folder in sealed.values()}
    assert len(weights) == 3


# Raw data and report -----------------------------------------------------------------------


def test_a_part_survives_packing() -> None:
    before = part(
        reply([1.0001, 1.5, 1.5, 2.25], "a", due=0.5, load_ms=12.0),
        reply([], None, error="503"),
        end=9.5,
    )
    packed = before.packed()
    assert packed["replies"][0]["times"] == [10001, 4999, 0, 7500]
    assert Part.unpacked(json.loads(json.dumps(packed))) == before


def record(rounds: int, *turns: dict[str, Any]) -> dict[str, Any]:
    return {"machine": MACHINE, "dtype": "float32", "rounds": rounds, "turns": list(turns)}


def test_a_case_replaces_itself_and_leaves_the_others(tmp_path: Path) -> None:
    assert neighbours.read(tmp_path) == {}
    neighbours.merge(tmp_path, {"flood": record(5), "six": record(5)})
    neighbours.merge(tmp_path, {"flood": record(1)})
    assert neighbours.read(tmp_path) == {"flood": record(1), "six": record(5)}
    assert [each.name for each in tmp_path.iterdir()] == [neighbours.RAW]


def overheads(target: str, round_: int, tokens: int) -> dict[str, Any]:
    parts = {
        "one": part(reply([1 + i / 10 for i in range(tokens)])),
        "many": part(reply([1 + i / 10 for i in range(tokens)])),
    }
    packed = {name: each.packed() for name, each in parts.items()}
    return {"target": target, "round": round_, "parts": packed}


def test_rounds_are_paired_whatever_their_order() -> None:
    raw = {
        "overhead": record(
            2,
            overheads("loraplex", 1, 20),
            overheads("stock", 0, 10),
            overheads("stock", 1, 40),
            overheads("loraplex", 0, 10),
        )
    }
    outcomes = neighbours_report.judged(neighbours_report.figures(neighbours_report.unpacked(raw)))
    (found,) = (o for o in outcomes if o.row.figure == "one_tokens_s")
    assert found.ratio == Spread(pytest.approx(1.5 / 2.5), 0.5, 1.0)
    assert found.holds is False
    (failed,) = (o for o in outcomes if o.row.figure == "failed")
    assert failed.holds is True


@pytest.mark.parametrize(
    ("row", "spread", "holds"),
    [
        (Row("c", "", "c", "f", at_most=3), Spread(3, 1, 9), True),
        (Row("c", "", "c", "f", at_most=3), Spread(3.1, 1, 9), False),
        (Row("c", "", "c", "f", at_most=3, worst=True), Spread(2, 1, 9), False),
        (Row("c", "", "c", "f", at_most=0, worst=True), Spread(0, 0, 1), False),
        (Row("c", "", "c", "f", at_most=0, worst=True), Spread(0, 0, 0), True),
        (Row("c", "", "c", "f", at_least=0.98), Spread(0.98, 0.5, 1), True),
        (Row("c", "", "c", "f", at_least=0.98), Spread(0.97, 0.5, 1), False),
        (Row("c", "", "c", "f"), Spread(1, 1, 1), None),
    ],
)
def test_bars(row: Row, spread: Spread, holds: bool | None) -> None:
    outcome = neighbours_report.Outcome(row, spread, None, None)
    assert outcome.holds is holds
    assert neighbours_report.Outcome(replace(row, ratio=True), spread, None, None).holds is None


def test_against_the_bar() -> None:
    assert neighbours_report.against_bar(Row("c", "", "c", "f", at_most=2), 1) == 0.5
    assert neighbours_report.against_bar(Row("c", "", "c", "f", at_least=0.9), 1.8) == 0.5


def test_figures_in_words() -> None:
    assert neighbours_report.said(None) == ""
    assert neighbours_report.said(Spread(0, 0, 0)) == "0"
    assert neighbours_report.said(Spread(0.913, 0.9, 1)) == "0.91 (0.90-1.00)"
    assert neighbours_report.said(Spread(1234.5, 1000, 2000)) == "1,234 (1,000-2,000)"


def test_table_says_what_is_cleared_and_what_is_missing() -> None:
    raw = {"overhead": record(1, overheads("loraplex", 0, 10), overheads("stock", 0, 10))}
    outcomes = neighbours_report.judged(neighbours_report.figures(neighbours_report.unpacked(raw)))
    text = neighbours_report.table(raw, outcomes)
    lines = [line for line in text.splitlines() if line.startswith("| overhead | 1 stream, tok")]
    assert lines == ["| overhead | 1 stream, tokens/s | 1 | 1 | 1 | ≥ 0.97 × stock | yes |"]
    assert "Not measured: flood, six, bystanders, shares, fifty, thousand." in text
    assert "overhead: 1 rounds" in text
    assert "commit 0123456789ab with 3 files changed; float32 on" in text


def test_a_bar_without_a_measurement_is_not_cleared() -> None:
    raw = {"overhead": record(1, overheads("loraplex", 0, 10))}
    outcomes = neighbours_report.judged(neighbours_report.figures(neighbours_report.unpacked(raw)))
    assert "**not measured**" in neighbours_report.table(raw, outcomes)


@pytest.mark.usefixtures("quick")
async def test_report_from_raw_data(tmp_path: Path) -> None:
    raw: dict[str, Any] = {}
    for group in neighbours.GROUPS:
        for case in group.cases:
            turns = []
            for target in group.servers:
                for round_ in range(2):
                    parts, _ = await done(case, round_)
                    packed = {name: each.packed() for name, each in parts.items()}
                    turns.append({"target": target, "round": round_, "parts": packed})
            raw[case] = record(2, *turns)
    neighbours.merge(tmp_path, raw)
    shown = CliRunner().invoke(neighbours.cli, ["report", "--out", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    names = {each.name for each in tmp_path.iterdir()}
    plots = {"bars.png", "flood.png", "shares.png", "bystanders.png", "thousand.png"}
    assert names == plots | {neighbours.RAW, "table.md", "summary.json"}
    text = (tmp_path / "table.md").read_text()
    assert "Not measured" not in text
    assert "**not measured**" not in text
    for row in neighbours_report.ROWS:
        assert f"| {row.case} | {row.said} |" in text


def test_an_unknown_case_is_refused() -> None:
    shown = CliRunner().invoke(neighbours.cli, ["--case", "floods"])
    assert shown.exit_code == 2
    assert "no case floods" in shown.output
