"""A real Prometheus scrapes the server, and every panel of the dashboard has something to show."""

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.real.conftest import Server

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "loraplex.json"
SCRAPE_S = 1
LOAD_S = 30  # as long as the rates look back
START_S = 60

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs prometheus (apt-get install prometheus)"
)


def panels() -> Iterator[dict[str, Any]]:
    """All panels, those in collapsed rows too."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        yield panel
        yield from panel.get("panels", [])


def queries() -> list[tuple[str, str]]:
    """Title and query, of every query of every panel, as Grafana would send it."""
    found = []
    for panel in panels():
        for target in panel.get("targets", []):
            query = target["expr"].replace("$__rate_interval", f"{LOAD_S}s")
            query = query.replace("$__range", f"{LOAD_S}s").replace("$__interval", "5s")
            found.append((panel["title"], re.sub(r"\$\{?\w+\}?", ".*", query)))
    return found


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """With our configuration, but for whom it scrapes and how often."""
    folder = tmp_path_factory.mktemp("prometheus")
    given = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    config = re.sub(r"scrape_interval: \S+", f"scrape_interval: {SCRAPE_S}s", given)
    config = re.sub(r"scrape_timeout: \S+", f"scrape_timeout: {SCRAPE_S}s", config)
    config = re.sub(r"loraplex:8000", f"127.0.0.1:{server.port}", config)
    rules = DEPLOY / "prometheus" / "alerts.yml"
    config = config.replace("- alerts.yml", f"- {rules}")
    (folder / "key").write_text("there-are-no-keys")
    config = re.sub(r"credentials_file: \S+", f"credentials_file: {folder / 'key'}", config)
    (folder / "prometheus.yml").write_text(config)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=30) as client:
            deadline = time.monotonic() + START_S
            while not _up(client):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, client.get("/api/v1/targets").text
                time.sleep(0.5)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def _up(client: httpx.Client) -> bool:
    try:
        return any(value == "1" for value in _values(client, 'up{job="loraplex"}'))
    except httpx.TransportError:
        return False


def _values(client: httpx.Client, query: str) -> list[str]:
    reply = client.get("/api/v1/query", params={"query": query}).json()
    assert reply["status"] == "success", (query, reply)
    return [each["value"][1] for each in reply["data"]["result"]]


def load(server: Server, stop: threading.Event) -> None:
    """Streams on all adapters and the base, loads, and an error now and then."""
    with httpx.Client(base_url=server.url, timeout=120) as client:
        while not stop.is_set():
            for name in ("sql", "code", "poetry", "base"):
                body = {"model": name, "prompt": "On", "max_tokens": 8, "stream": True}
                client.post("/v1/completions", json=body | {"ignore_eos": True})
            assert client.post("/v1/adapters/sql/unload").status_code in (200, 409)
            body = {"model": "nobody", "prompt": "x"}
            assert client.post("/v1/completions", json=body).status_code == 404


def test_every_panel_has_data_while_load_runs(server: Server, prometheus: httpx.Client) -> None:
    asked = queries()
    assert len(asked) >= 20
    stop = threading.Event()
    sender = threading.Thread(target=load, args=(server, stop))
    sender.start()
    try:
        empty = dict(asked)
        deadline = time.monotonic() + 4 * LOAD_S
        while empty and time.monotonic() < deadline:
            time.sleep(SCRAPE_S)
            empty = {
                title: query
                for title, query in asked
                if all(value == "NaN" for value in _values(prometheus, query))
            }
    finally:
        stop.set()
        sender.join()
    assert empty == {}


def test_alerts_are_known_and_none_fires(prometheus: httpx.Client) -> None:
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) >= 5
    assert [rule["name"] for rule in rules if rule["health"] == "err"] == []
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def test_all_series_that_panels_and_alerts_name_are_there(
    server: Server, prometheus: httpx.Client
) -> None:
    known = set(prometheus.get("/api/v1/label/__name__/values").json()["data"])
    text = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    text += "".join(query for _, query in queries())
    named = set(re.findall(r"\b(?:loraplex|vllm)[_:][a-z_:]+", text))
    assert named and named <= known, named - known
