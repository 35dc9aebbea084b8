"""Workload files and the requests they mean."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import workload
from benchmarks.workload import Case, Closed, Open, Pattern, Workload, WorkloadError

FILES = sorted((Path(workload.__file__).parent / "workloads").glob("*.toml"))


def made(load: Closed | Open, seed: int = 42, count: int = 16) -> tuple[Workload, Case]:
    case = Case(name="c", targets=("t",), load=load)
    whole = Workload.model_validate(
        {
            "name": "w",
            "about": "",
            "seed": seed,
            "adapters": {"a": {"count": count, "rank": 8}},
            "targets": {"t": {"kind": "vllm", "adapters": ["a"]}},
            "cases": [case],
        }
    )
    return whole, case


def closed(pattern: Pattern, streams: int = 8, requests: int = 2, **more: int) -> Closed:
    return Closed(
        streams=streams,
        requests=requests,
        prompt=12,
        output=4,
        pattern=pattern,
        adapters="a",
        use=more.get("use"),
    )


def arrivals(**more: float) -> Open:
    return Open(
        rate=more.get("rate", 5),
        seconds=more.get("seconds", 4000),
        cv=more.get("cv", 1),
        alpha=more.get("alpha", 1),
        prompt=(8, 9),
        output=(2, 6),
        adapters="a",
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_workload_file_means_something(path: Path) -> None:
    whole = workload.read(path)
    for case in whole.cases:
        sent = workload.requests(whole, case, 0)
        assert case.load.kind == "start" or sent
        for request in sent:
            assert len(request.prompt) + request.output <= 2048


def test_equal_seeds_equal_requests_and_rounds_differ() -> None:
    whole, case = made(closed("skewed"))
    assert workload.requests(whole, case, 3) == workload.requests(*made(closed("skewed")), 3)
    prompts = [r.prompt for i in (-1, 0, 1) for r in workload.requests(whole, case, i)]
    assert len(set(prompts)) == len(prompts)
    other = made(closed("skewed"), seed=43)
    assert workload.requests(whole, case, 0) != workload.requests(*other, 0)


def test_prompts_are_tokens_of_the_base_and_none_is_special() -> None:
    whole, case = made(arrivals(seconds=100))
    tokens = {token for r in workload.requests(whole, case, 0) for token in r.prompt}
    assert min(tokens) >= workload.FIRST_TOKEN
    assert max(tokens) < whole.vocabulary


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ("distinct", [1] * 16),
        ("uniform", [4, 4, 4, 4]),
        ("skewed", [6, 4, 3, 2, 1]),
        ("identical", [16]),
        ("round-robin", [4, 4, 4, 4]),
    ],
)
def test_patterns(pattern: Pattern, sizes: list[int]) -> None:
    use = {"use": 4} if pattern == "round-robin" else {}
    sent = workload.requests(*made(closed(pattern, **use)), 0)
    counted = sorted(Counter(r.adapter for r in sent).values(), reverse=True)
    assert counted == sizes


def test_skewed_sizes_sum_up_for_every_total() -> None:
    for total in range(1, 200):
        sizes = workload.popularity("skewed", total)
        assert sum(sizes) == total
        assert min(sizes) > 0


def test_round_robin_gives_a_stream_one_adapter() -> None:
    sent = workload.requests(*made(closed("round-robin", use=4)), 0)
    assert {(r.stream, r.adapter) for r in sent} == {(s, f"a-{s % 4}") for s in range(8)}


def test_no_pattern_no_adapter() -> None:
    sent = workload.requests(*made(closed("none")), 0)
    assert {r.adapter for r in sent} == {None}


@pytest.mark.parametrize("cv", [0.5, 1, 2])
def test_gamma_arrivals(cv: float) -> None:
    sent = workload.requests(*made(arrivals(cv=cv)), 0)
    due = np.array([r.due_s for r in sent])
    gaps = np.diff(due)
    assert (gaps >= 0).all()
    assert np.mean(gaps) == pytest.approx(1 / 5, rel=0.06)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.06)


@pytest.mark.parametrize("alpha", [0.3, 1, 3])
def test_power_law_of_adapters(alpha: float) -> None:
    sent = workload.requests(*made(arrivals(alpha=alpha)), 0)
    counted = Counter(r.adapter for r in sent)
    for i in range(16):
        expected = ((i + 1) / 16) ** alpha - (i / 16) ** alpha
        assert counted[f"a-{i}"] / len(sent) == pytest.approx(expected, abs=0.012)
    assert {r.output for r in sent} == {2, 3, 4, 5}


GOOD = """
name = "w"
about = ""
[adapters]
a = { count = 2, rank = 8 }
[targets.one]
kind = "vllm"
[targets.two]
kind = "loraplex"
adapters = ["a"]
[[cases]]
name = "c"
targets = ["one", "two"]
load = { kind = "closed", streams = 2, prompt = 4, output = 2, pattern = "identical", adapters="a" }
[[ratios]]
case = "c"
target = "two"
against = "one"
"""


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"vllm"', '"vlm"', "targets.one.kind"),
        ('adapters = ["a"]', 'adapters = ["b"]', "target two: no adapter set 'b'"),
        ('targets = ["one", "two"]', 'targets = ["one", "3"]', "case c: no target '3'"),
        ('"identical"', '"distinct"', ""),
        ("streams = 2", "streams = 3, requests = 1", ""),
        ('pattern = "identical"', 'pattern = "distinct", use = 1', "needs 2 adapters, 1 are"),
        ('against = "one"', 'against = "none"', "case c does not run target 'none'"),
        ('about = ""', 'about = ""\ngroups = [["one"], ["two"]]', "in no group together"),
        ("[[ratios]]", "[[ratios", "not TOML"),
        ("rank = 8", "rank = 8, alpha = 2", "adapters.a.alpha"),
    ],
)
def test_a_bad_file_is_said_in_one_line(tmp_path: Path, before: str, after: str, said: str) -> None:
    path = tmp_path / "w.toml"
    assert before in GOOD
    path.write_text(GOOD.replace(before, after))
    if not said:
        workload.read(path)
        return
    with pytest.raises(WorkloadError, match=f"^[^\n]*{said}[^\n]*$"):
        workload.read(path)


def test_only_a_part(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text(GOOD)
    whole = workload.read(path)
    part = whole.only(["c"], ["two"])
    assert list(part.targets) == ["two"]
    assert part.ratios == ()
    assert part.cases[0].targets == ("two",)
    with pytest.raises(WorkloadError, match="no target 'three'"):
        whole.only([], ["three"])


def test_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="No such file"):
        workload.read(tmp_path / "none.toml")
