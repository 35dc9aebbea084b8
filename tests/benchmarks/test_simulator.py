"""The simulator: its arithmetic by hand, its books, and that it tells policies apart."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import simulator, simulator_plots
from benchmarks.simulator_model import Engine, Request, Simulation, replay
from server.admission import Limits

ROUND = Engine(
    step=1.0,
    sequence=0.1,
    adapter=0.01,
    prompt_token=0.001,
    load=10.0,
    load_bytes_s=1e6,
    slot_bytes_s=1e8,
)


def limits(slots: int = 2, seats: int = 4, prefill: int = 100, quantum: float = 512) -> Limits:
    return Limits(slots, seats, prefill, waiting=10**9, of_adapter=10**9, quantum=quantum)


def test_one_request_by_hand() -> None:
    simulation = Simulation(limits(), ROUND, size=2 * 10**6)
    (served,) = simulation.run([Request("a", 50, 3, arrival=5.0)]).served
    # A load of 10 s + 2 MB at 1 MB/s, a copy of 2 MB at 100 MB/s, a step with the prompt in it.
    assert served.first == pytest.approx(5 + 12 + 0.02 + 1 + 0.01 + 0.05)
    # Two more steps of one sequence and one adapter.
    assert served.end == pytest.approx(served.first + 2 * (1 + 0.1 + 0.01))


def test_prompts_share_a_step_and_the_rest_waits_for_the_next() -> None:
    one, two = Request(None, 60, 2), Request(None, 60, 2)
    outcome = Simulation(limits(), ROUND).run([one, two])
    first, second = sorted(outcome.served, key=lambda served: served.first)
    assert first.first == pytest.approx(1 + 0.1)  # 100 tokens of prompts
    # One sequence takes a token of the step's, and the second's 20 that are left are done.
    assert second.first == pytest.approx(1.1 + 1 + 0.1 + 0.02)
    assert first.end == pytest.approx(second.first)
    assert second.end == pytest.approx(second.first + 1.1)


def test_an_arrival_is_seen_after_the_step_in_which_it_comes() -> None:
    outcome = Simulation(limits(), ROUND).run([Request(None, 1, 100), Request(None, 1, 1, 5.0)])
    last = min(outcome.served, key=lambda served: served.end)
    began = 1.001 + 4 * 1.1  # the first step that ends after 5 s
    assert last.first == pytest.approx(began + 1 + 0.1 + 0.001)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    slots=st.integers(1, 3),
    spare=st.integers(0, 3),
    quantum=st.sampled_from([None, 0, 100]),
)
def test_all_is_served_and_tokens_add_up(
    seed: int, slots: int, spare: int, quantum: float | None
) -> None:
    load = simulator.open_load(6, 60, 2.0, alpha=0.5, cv=2, seed=seed, output=(1, 40))
    simulation = Simulation(
        limits(slots, 3, 64, quantum or 0), places=slots + spare, fcfs=quantum is None
    )
    outcome = simulation.run(load)
    assert Counter(id(s.request) for s in outcome.served) == Counter(map(id, load))
    assert outcome.service.total() == sum(r.prompt + 2 * r.output for r in load)
    for served in outcome.served:
        assert served.request.arrival <= served.first <= served.end < math.inf
        assert served.end - served.first >= (served.request.output - 1) * Engine().step
    assert outcome.seconds == max(served.end for served in outcome.served)
    assert list(simulation.waiting()) == []
    assert len(simulation.admission) == 0
    assert len(list(simulation.residency.entries())) <= slots + spare
    assert not any(entry.leases for entry in simulation.residency.entries())


def test_equal_seeds_give_equal_figures() -> None:
    run = simulator.Run("synthetic", "gpu", 4, 8, 8, 20, requests=300, rate=4.0, alpha=0.3)
    first, second, other = (
        vars(simulator.simulate(each)) | {"cpu_s": 0}
        for each in (run, run, simulator.Run(**{**vars(run), "seed": 1}))
    )
    assert first == second
    assert first != other


def test_a_flood_starves_the_victim_of_first_come_first_served_and_not_of_ours() -> None:
    flood = {"slots": 2, "seats": 8, "places": 8, "adapters": 2, "clients": 6, "victim": 0.05}
    stock, ours = (
        simulator.simulate(simulator.Run("flood", "cpu", seconds=400, quantum=quantum, **flood))
        for quantum in (None, 512)
    )
    assert stock.worst > 150  # half of the time there is, or nearly: until the end
    assert ours.worst < 40
    assert ours.tokens_s > 0.75 * stock.tokens_s


def test_shares_of_clients_that_always_wait_are_even_only_with_ours() -> None:
    shares = {"slots": 2, "seats": 8, "places": 8, "adapters": 4, "clients": 4}
    stock, ours = (
        simulator.simulate(simulator.Run("shares", "cpu", seconds=900, quantum=quantum, **shares))
        for quantum in (None, 512)
    )
    assert stock.jain is not None and stock.jain < 0.6
    assert ours.jain is not None and ours.jain > 0.97


def test_first_come_first_served_overtakes_only_for_a_slot() -> None:
    trace = [Request(name, 10, 5) for name in ("a", "b", "a", None, "b")]
    simulation = Simulation(limits(slots=1, seats=2), ROUND, fcfs=True)
    simulation.run(trace)
    names = [each.adapter for each in simulation.admitted]
    assert names[0] is None  # needs no load
    assert names[1:] == ["a", "a", "b", "b"]


def test_a_replay_says_in_what_order_a_trace_is_served() -> None:
    trace = [Request("a", 10, 5, 1.0), Request(None, 10, 5, 0.0), Request("a", 10, 5, 0.5)]
    order = replay(trace, limits(slots=1, seats=1))
    assert order.admitted == order.first == [1, 2, 0]
    assert order.first_s[1] < order.first_s[2] < order.first_s[0]
    with pytest.raises(ValueError, match="twice"):
        replay([trace[0], trace[0]], limits())


def test_figures_of_all_runs_are_drawn(tmp_path: Path) -> None:
    lines = [
        {"run": vars(run), "figures": vars(simulator.simulate(run))}
        for run in simulator.runs(0.01)
        if run.adapters < 10000
    ]
    json.dumps(lines)
    simulator_plots.draw(lines, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "quantum.png",
        "adapters.png",
        "eviction.png",
    }
