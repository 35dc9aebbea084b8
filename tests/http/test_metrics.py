"""What operators and routers read: series, usage, logs."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import MakeAdapter
from tests.http.conftest import SLOTS, Running, cool, serve, settings, upload

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
ASKED = {"prompt": [1] * 10, "max_tokens": 6, "ignore_eos": True}


def samples(client: httpx.Client) -> Samples:
    """All series; none is there twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((name, frozenset(labels.items())), 0.0)


def labels(found: Samples, name: str) -> list[dict[str, str]]:
    return [dict(each) for series, each in found if series == name]


def complete(client: httpx.Client, **more: Any) -> httpx.Response:
    return client.post("/v1/completions", json=ASKED | more)


def test_requests_of_an_adapter_are_counted(http: httpx.Client, four: dict[str, str]) -> None:
    cool(http)
    before = samples(http)
    assert complete(http, adapter="one").status_code == 200
    with http.stream(
        "POST", "/v1/completions", json=ASKED | {"adapter": "one", "stream": True}
    ) as s:
        assert len(list(s.iter_lines())) > 6
    assert complete(http, adapter="one", max_tokens=-1).status_code == 400
    after = samples(http)

    def more(name: str, **labels: str) -> float:
        labels["adapter"] = "one"
        return value(after, name, **labels) - value(before, name, **labels)

    assert more("loraplex_requests_total", status="200") == 2
    assert more("loraplex_prompt_tokens_total") == 20
    assert more("loraplex_output_tokens_total") == 12
    assert more("loraplex_first_token_seconds_count") == 2
    assert more("loraplex_queue_seconds_count") == 2
    assert more("loraplex_load_wait_seconds_count") == 1  # the first found it on disk
    gaps = more("loraplex_token_gap_seconds_count")
    assert 1 <= gaps <= 5  # tokens may share an event
    assert more("loraplex_token_gap_seconds_bucket", le="+Inf") == gaps
    assert 0 < more("loraplex_first_token_seconds_sum") < 10
    assert (
        value(
            after,
            "loraplex_http_requests_total",
            method="POST",
            route="/v1/completions",
            status="200",
        )
        >= 2
    )


def test_errors_are_counted_by_code(running: Running, http: httpx.Client, four: Any) -> None:
    before = samples(http)
    assert complete(http, adapter="nobody").status_code == 404
    cool(http)

    async def fails(request: Any) -> None:
        raise RuntimeError("broken")

    running.core.on_load = fails
    try:
        assert complete(http, adapter="two").status_code == 503
    finally:
        running.core.on_load = None
    after = samples(http)
    for adapter, code in (("_other", "adapter_not_found"), ("two", "adapter_load_failed")):
        name = {"adapter": adapter, "code": code}
        assert value(after, "loraplex_errors_total", **name) == 1 + value(
            before, "loraplex_errors_total", **name
        )


def test_a_deleted_adapter_has_no_series(http: httpx.Client, make_adapter: MakeAdapter) -> None:
    assert upload(http, "brief", make_adapter(77)).status_code == 201
    assert complete(http, adapter="brief").status_code == 200
    assert '"brief"' in http.get("/metrics").text
    others = value(samples(http), "loraplex_requests_total", adapter="_other", status="200")
    assert http.delete("/v1/adapters/brief").status_code == 200
    assert '"brief"' not in http.get("/metrics").text
    after = samples(http)
    assert value(after, "loraplex_requests_total", adapter="_other", status="200") == others + 1


def test_routers_see_what_is_loaded_under_clients_names(
    http: httpx.Client, four: dict[str, str]
) -> None:
    cool(http)
    for name in ("one", "two", "three"):
        assert complete(http, adapter=name).status_code == 200
    found = samples(http)
    levels = {
        each["adapter_name"]: (each["level"], each["pinned"])
        for each in labels(found, "vllm:lora_adapter_loaded")
    }
    assert levels == {"one": ("cpu", "false"), "two": ("gpu", "false"), "three": ("gpu", "false")}
    assert value(found, "vllm:num_gpu_loaded_lora_adapters") == 2
    assert value(found, "vllm:max_gpu_lora_adapters") == SLOTS
    (info,) = labels(found, "vllm:lora_requests_info")
    assert info == {
        "max_lora": str(SLOTS),
        "running_lora_adapters": "",
        "waiting_lora_adapters": "",
    }
    assert http.post("/v1/adapters/one/pin").status_code == 200
    pinned = [e for e in labels(samples(http), "vllm:lora_adapter_loaded") if e["pinned"] == "true"]
    assert [each["adapter_name"] for each in pinned] == ["one"]
    assert http.post("/v1/adapters/one/unpin").status_code == 200


def test_routers_see_who_runs_and_who_waits(
    running: Running, http: httpx.Client, four: dict[str, str]
) -> None:
    asked = ASKED | {"max_tokens": 400, "stream": True}
    with (
        http.stream("POST", "/v1/completions", json=asked | {"adapter": "one"}) as one,
        http.stream("POST", "/v1/completions", json=asked | {"adapter": "two@1"}) as two,
        http.stream("POST", "/v1/completions", json=asked) as base,
    ):
        lines = [stream.iter_lines() for stream in (one, two, base)]
        assert all(next(each) for each in lines)
        (info,) = labels(samples(http), "vllm:lora_requests_info")
        assert info["running_lora_adapters"] == "one,two"


def test_what_is_stored_is_counted(http: httpx.Client, four: dict[str, str]) -> None:
    found = samples(http)
    listed = http.get("/v1/adapters", params={"limit": 1000}).json()["data"]
    assert value(found, "loraplex_adapters") == len(listed)
    assert value(found, "loraplex_versions", state="ready") >= 4
    assert value(found, "loraplex_stored_bytes") > 0


def test_thousands_of_paths_and_methods_make_one_series(http: httpx.Client) -> None:
    for number in range(30):
        http.request(f"X{number}", f"/nothing/{number}")
    routes = labels(samples(http), "loraplex_http_requests_total")
    assert len([each for each in routes if each["route"] == "none"]) <= 3
    assert not any("nothing" in each["route"] for each in routes)


def test_the_usage_is_by_key_and_adapter(http: httpx.Client, four: dict[str, str]) -> None:
    def used(adapter: str) -> list[int]:
        """Requests and tokens without a key, in all hours: one may end while this runs."""
        rows = http.get("/v1/usage").json()["data"]
        mine = [row for row in rows if (row["key"], row["adapter"]) == ("", adapter)]
        return [
            sum(row[count] for row in mine)
            for count in ("requests", "prompt_tokens", "output_tokens")
        ]

    before = used("three")
    assert complete(http, adapter="three").status_code == 200
    assert used("three") == [before[0] + 1, before[1] + 10, before[2] + 6]
    assert complete(http).status_code == 200
    assert used("base")[0] > 0
    lines = http.get("/v1/usage", params={"format": "csv"}).text.splitlines()
    assert lines[0] == "hour,key,adapter,requests,prompt_tokens,output_tokens"
    assert any(",three," in line for line in lines[1:])
    hours = http.get("/v1/adapters/three").json()["usage"]
    assert sum(each["requests"] for each in hours) == before[0] + 1
    assert http.get("/v1/usage", params={"until": 10}).json()["data"] == []
    assert http.get("/v1/usage", params={"since": -1}).status_code == 400


def test_the_command_line_prints_the_usage(running: Running, http: httpx.Client) -> None:
    assert complete(http).status_code == 200
    http.get("/v1/usage")  # which writes it
    home = str(running.serving.settings.home)
    command = [sys.executable, "-m", "server.cli", "usage", "--home", home]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert re.search(r"Z,,base,\d+,\d+,\d+\n", done.stdout)


def test_a_request_has_an_id(http: httpx.Client) -> None:
    assert (
        http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    )
    made = [http.get("/health").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1] and all(re.fullmatch("[0-9a-f]{32}", each) for each in made)
    odd = http.get("/health", headers={"x-request-id": "a b\tc"}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", odd)
    reply = http.post(
        "/v1/chat/completions",
        headers={"x-request-id": "mine-2"},
        json={"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    )
    assert reply.json()["id"] == "chatcmpl-mine-2"


@pytest.fixture
def noted(running: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What a JSON log would have of each request."""
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "server.logs.note", lambda event, **fields: lines.append({"event": event, **fields})
    )
    yield lines


def test_a_requests_line(
    http: httpx.Client, four: dict[str, str], noted: list[dict[str, Any]]
) -> None:
    secret = "a prompt nobody else is to read"
    asked = {"prompt": secret, "max_tokens": 3, "adapter": "one"}
    said = http.post("/v1/completions", json=asked, headers={"x-request-id": "r1"})
    assert complete(http, adapter="nobody").status_code == 404
    for path in ("/health", "/ready", "/metrics"):
        assert http.get(path).status_code == 200
    while len(noted) < 2:  # a line comes when the reply has gone
        time.sleep(0.01)
    first, second = noted
    assert first["event"] == "request" and first["request_id"] == "r1"
    assert (first["adapter"], first["version"], first["status"]) == ("one", 1, 200)
    assert first["output_tokens"] == 3 and first["duration_ms"] >= first["ttft_ms"] >= 0
    assert (second["status"], second["code"]) == (404, "adapter_not_found")
    text = json.dumps(noted)
    assert secret not in text and said.json()["choices"][0]["text"] not in text


def test_json_logs_are_json_from_the_first_line(home: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--home", str(home)]
    done = subprocess.run(
        [*command, "--log-format", "json", "--model", "/nowhere", "--port", "1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1
    assert lines[-1]["level"] == "ERROR" and lines[-1]["message"]


def test_there_are_names_for_the_busiest_only(
    base_folder: Path, home: Path, make_adapter: MakeAdapter
) -> None:
    for few in serve(settings(home, "--metrics-adapters", "2"), base_folder):
        with httpx.Client(base_url=few.url, timeout=30) as client:
            for seed in range(5):
                assert upload(client, f"a{seed}", make_adapter(seed + 1)).status_code == 201
                assert complete(client, adapter=f"a{seed}").status_code == 200
            named = {each["adapter"] for each in labels(samples(client), "loraplex_requests_total")}
            assert len(named) == 3 and "_other" in named
