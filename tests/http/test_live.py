"""GET /v1/live: what sits where, who waits, and what was done; to each key what it may see."""

from typing import Any

import httpx

from tests.conftest import MakeAdapter
from tests.http.conftest import HOST, SLOTS, Running, cool, upload


def say(http: httpx.Client, model: str, **more: Any) -> None:
    asked = {"model": model, "prompt": "On", "max_tokens": 5, "ignore_eos": True, **more}
    assert http.post("/v1/completions", json=asked).status_code == 200


def test_what_is_there_and_what_was_done(http: httpx.Client, four: dict[str, str]) -> None:
    cool(http)
    begin = http.get("/v1/live").json()["now"]
    for _ in range(2):
        say(http, "one")
    say(http, "base")
    live = http.get("/v1/live", params={"since": begin}).json()
    assert (live["slots"], live["places"], live["ready"]) == (SLOTS, HOST, True)
    [entry] = live["resident"]
    assert (entry["reference"], entry["residency"], entry["leases"]) == ("one@1", "slot", 0)
    assert entry["digest"] == four["one"]
    assert entry["bytes"] > 0
    adapters = {each["adapter"]: each for each in live["adapters"]}
    one, base = adapters["one"], adapters["smollm2-135m-instruct"]
    assert one["requests"] >= 2
    assert one["tokens_per_s"] > 0
    assert one["first_token_s"]["p50"] <= one["first_token_s"]["p99"]
    assert (one["residency"], base["residency"]) == ("slot", None)
    assert (one["waiting"], one["running"]) == (0, 0)
    totals = live["totals"]
    assert (totals["waiting"], totals["running"]) == (0, 0)
    assert totals["adapters"] == len(adapters)
    rates = sum(each["tokens_per_s"] for each in adapters.values())
    assert abs(totals["tokens_per_s"] - rates) < 0.01 * len(adapters)
    assert [event["event"] for event in live["events"]] == ["loaded", "slot"]
    assert {event["reference"] for event in live["events"]} == {"one@1"}
    tokens = sum(each["adapters"].get("one", {}).get("tokens", 0) for each in live["history"])
    assert tokens >= 10
    later = http.get("/v1/live", params={"since": live["now"]}).json()
    assert later["events"] == []


def test_evictions_are_told(http: httpx.Client, four: dict[str, str]) -> None:
    cool(http)
    begin = http.get("/v1/live").json()["now"]
    for name in four:
        say(http, name)
    events = http.get("/v1/live", params={"since": begin}).json()["events"]
    assert [e["reference"] for e in events if e["event"] == "evicted"] == ["one@1"]
    assert sum(event["event"] == "loaded" for event in events) == 4
    assert all(event["seconds"] >= 0 for event in events if event["event"] == "loaded")


def test_a_stream_counts_while_it_runs(http: httpx.Client, running: Running) -> None:
    asked = {"model": "base", "prompt": "On", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=asked) as reply:
        lines = reply.iter_lines()
        for _ in range(10):
            next(lines)
        with httpx.Client(base_url=running.url) as other:
            adapters = other.get("/v1/live").json()["adapters"]
        [base] = [each for each in adapters if each["adapter"] == "smollm2-135m-instruct"]
        assert base["running"] == 1
        assert base["tokens_per_s"] > 0


def test_an_event_names_all_who_have_the_bytes(
    http: httpx.Client, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter(991)
    for name in ("same.one", "same.two"):
        assert upload(http, name, folder).status_code == 201
    cool(http)  # the proof has loaded it
    begin = http.get("/v1/live").json()["now"]
    assert http.post("/v1/adapters/same.two/load").status_code == 200
    loaded = http.get("/v1/live", params={"since": begin}).json()["events"][0]
    assert loaded["event"] == "loaded"
    assert loaded["references"] == ["same.one@1", "same.two@1"]
    for name in ("same.one", "same.two"):
        assert http.delete(f"/v1/adapters/{name}").status_code == 200
