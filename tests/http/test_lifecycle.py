"""From an alias to the last byte: versions that move under load, imports, proof, damage."""

import asyncio
import concurrent.futures
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from adapters.store import digest
from server.errors import EngineNotReady
from tests.conftest import MakeAdapter, with_base
from tests.fake_engine import speaker
from tests.http.conftest import Running, cool, serve, settings, upload

WEIGHTS = "adapter_model.safetensors"
ASKED = {"prompt": "Hi", "max_tokens": 12}


def said(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def codes(reply: httpx.Response) -> set[str]:
    assert reply.status_code == 422, reply.text
    return {problem["code"] for problem in reply.json()["error"]["problems"]}


def until(what: Any, seconds: float = 20) -> None:
    for _ in range(int(seconds / 0.05)):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


# Aliases -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_versions(http: httpx.Client, make_adapter: MakeAdapter) -> list[str]:
    """Digests of versions 1 and 2 of `moving`."""
    return [upload(http, "moving", make_adapter(seed)).json()["digest"] for seed in (200, 201)]


def test_an_alias_is_set_moved_and_removed(http: httpx.Client, two_versions: list[str]) -> None:
    url = "/v1/adapters/moving/aliases/canary"
    first = http.put(url, json={"version": 1})
    assert (first.status_code, first.headers["etag"]) == (200, '"1"')
    assert first.json()["version"] == 1
    assert http.get("/v1/adapters/moving").json()["aliases"]["canary"] == 1
    assert said(http.post("/v1/completions", json=ASKED | {"model": "moving@canary"})).startswith(
        speaker(two_versions[0])
    )
    moved = http.put(url, json={"version": 2}, headers={"if-match": first.headers["etag"]})
    assert (moved.status_code, moved.json()["version"]) == (200, 2)
    late = http.put(url, json={"version": 1}, headers={"if-match": '"1"'})
    assert (late.status_code, late.json()["error"]["code"]) == (412, "alias_conflict")
    assert http.put(url, json={"version": 1}, headers={"if-none-match": "*"}).status_code == 412
    assert http.delete(url, headers={"if-match": '"1"'}).status_code == 412
    assert http.delete("/v1/adapters/moving/versions/2").status_code == 409
    assert http.delete(url, headers={"if-match": '"2"'}).json()["deleted"] is True
    assert http.delete(url).status_code == 404
    assert http.put(url, json={"version": 1}, headers={"if-none-match": "*"}).status_code == 200
    assert http.delete(url).status_code == 200


@pytest.mark.parametrize(
    ("alias", "sent", "headers", "status"),
    [
        ("latest", {"version": 1}, {}, 400),
        ("7", {"version": 1}, {}, 400),
        ("prod", {"version": 99}, {}, 404),
        ("prod", {"version": 0}, {}, 400),
        ("prod", {"version": "one"}, {}, 400),
        ("prod", {}, {}, 400),
        ("prod", {"version": 1}, {"if-match": "1"}, 400),
        ("prod", {"version": 1}, {"if-none-match": '"1"'}, 400),
        ("prod", {"version": 2**40}, {}, 404),
    ],
)
def test_alias_requests_that_cannot_be(
    http: httpx.Client, two_versions: list[str], alias: str, sent: Any, headers: Any, status: int
) -> None:
    reply = http.put(f"/v1/adapters/moving/aliases/{alias}", json=sent, headers=headers)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["message"]


def test_an_alias_moves_under_load_and_no_request_notices(
    running: Running, http: httpx.Client, two_versions: list[str]
) -> None:
    """Streams that began on one version end on it; none fails; both versions answer."""
    url = "/v1/adapters/moving/aliases/prod"
    http.put(url, json={"version": 1})
    speakers = [speaker(digest) for digest in two_versions]
    answered = set()

    async def ask(client: httpx.AsyncClient) -> None:
        asked = ASKED | {"model": "moving@prod", "max_tokens": 40, "ignore_eos": True}
        async with client.stream("POST", "/v1/completions", json=asked | {"stream": True}) as got:
            assert got.status_code == 200
            version = int(got.headers["x-loraplex-version"])
            lines = [line async for line in got.aiter_lines() if line.startswith("data: {")]
        text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines)
        assert speakers[version - 1] in text
        assert speakers[2 - version] not in text
        answered.add(version)

    async def all_the_time(client: httpx.AsyncClient, until: asyncio.Event) -> int:
        count = 0
        while not until.is_set():
            await ask(client)
            count += 1
        return count

    async def load() -> int:
        done = asyncio.Event()
        async with httpx.AsyncClient(base_url=running.url, timeout=30) as client:
            streams = [asyncio.create_task(all_the_time(client, done)) for _ in range(8)]
            for turn in range(30):
                moved = await client.put(url, json={"version": 1 + turn % 2})
                assert moved.status_code == 200
                await asyncio.sleep(0.05)
            done.set()
            return sum(await asyncio.gather(*streams))

    assert asyncio.run(load()) >= 16
    assert answered == {1, 2}


# Proof of effect ---------------------------------------------------------------------------


def test_the_proof_is_kept_with_the_version(http: httpx.Client, two_versions: list[str]) -> None:
    effect = http.get("/v1/adapters/moving/versions/1").json()["checks"]["effect"]
    assert effect["difference"] > 0 and effect["noise"] == 0 and effect["finite"] is True


@pytest.mark.parametrize(
    ("sounds_like", "code"), [("base", "no_effect"), ("nan", "nonfinite_output")]
)
def test_what_changes_nothing_or_computes_nan_is_refused(
    running: Running,
    http: httpx.Client,
    make_adapter: MakeAdapter,
    monkeypatch: pytest.MonkeyPatch,
    sounds_like: str,
    code: str,
) -> None:
    folder = make_adapter(210 + len(code))
    checked = http.post("/v1/adapters:check", files=_files(folder))
    assert checked.json()["ok"] is True, checked.text
    monkeypatch.setitem(running.core.speaks_as, digest(folder), sounds_like)
    loaded = set(running.core._loaded.values())
    assert codes(upload(http, "mute", folder)) == {code}
    shown = http.get("/v1/adapters/mute")
    assert shown.status_code == 404, shown.text
    assert not running.serving.store.has(digest(folder))
    for _ in range(100):
        if digest(folder) not in running.core._loaded.values():
            break
        time.sleep(0.02)
    assert set(running.core._loaded.values()) <= loaded, "refused, and still in the engine"


def test_an_untrained_adapter_is_refused_without_the_engine(
    running: Running, http: httpx.Client, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = shutil.copytree(make_adapter(1), tmp_path / "zero")
    zeros = {k: v * 0 if "lora_B" in k else v for k, v in load_file(folder / WEIGHTS).items()}
    save_file(zeros, folder / WEIGHTS)
    assert codes(upload(http, "zero", folder)) == {"no_effect"}
    checked = http.post("/v1/adapters:check", files=_files(folder)).json()
    assert checked["ok"] is False
    assert [problem["code"] for problem in checked["checks"]["problems"]] == ["no_effect"]


def test_what_the_engine_cannot_load_is_refused(
    running: Running, http: httpx.Client, make_adapter: MakeAdapter
) -> None:
    async def fail(_: Any) -> None:
        raise RuntimeError("no such shape")

    running.core.on_load = fail
    try:
        reply = upload(http, "odd", make_adapter(220))
    finally:
        running.core.on_load = None
    assert codes(reply) == {"engine_refused"}
    assert "no such shape" in reply.text


def test_check_and_refusals_do_not_wait_for_a_proof(
    running: Running, http: httpx.Client, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """However many adapters wait for the engine to try them out."""
    going = threading.Event()

    async def wait(_: Any) -> None:
        while not going.is_set():
            await asyncio.sleep(0.02)

    def add(number: int) -> httpx.Response:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            return upload(client, f"slow-{number}", folders[number])

    folders = [make_adapter(seed) for seed in range(221, 225)]
    running.core.on_load = wait
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(add, number) for number in range(4)]
            until(lambda: running.core.waiting_loads > 0)
            checked = http.post("/v1/adapters:check", files=_files(make_adapter(1)), timeout=10)
            assert checked.json()["ok"] is True
            bad = shutil.copytree(make_adapter(1), tmp_path / "bad")
            (bad / WEIGHTS).write_bytes(b"x")
            assert codes(upload(http, "bad", bad)) == {"weights_truncated"}
            assert not any(each.done() for each in waiting)
            going.set()
            assert {each.result().status_code for each in waiting} == {201}
    finally:
        going.set()
        running.core.on_load = None


def test_the_same_bytes_from_several_sides_are_proven_once(
    running: Running, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter(226)

    def add(name: str) -> httpx.Response:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            return upload(client, name, folder)

    before = running.serving.gateway._prover._asked
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(add, ("twin-a", "twin-b", "twin-b", "twin-c")))
    assert sorted(reply.status_code for reply in replies) == [200, 201, 201, 201]
    assert running.serving.gateway._prover._asked - before == 6  # two prompts, three times each


# Check and show ----------------------------------------------------------------------------


def _files(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    names = ("adapter_config.json", WEIGHTS)
    return [("files", (name, (folder / name).read_bytes())) for name in names]


def test_check_tells_all_and_stores_nothing(
    running: Running, http: httpx.Client, make_adapter: MakeAdapter
) -> None:
    before = set(running.serving.store.sealed())
    told = http.post("/v1/adapters:check", files=_files(make_adapter(230))).json()
    assert told["ok"] is True and told["rank"] == 8
    assert told["checks"]["problems"] == []
    assert "stored_in_fp32" in {each["code"] for each in told["checks"]["advice"]}
    assert told["algebra"]["norm"] > 0 and 0 < told["algebra"]["rank_99"] <= 8
    assert set(running.serving.store.sealed()) == before
    assert http.post("/v1/adapters:check", data={"name": "x"}).status_code == 400


def test_show_has_config_algebra_advice_and_effect_of_the_newest(
    http: httpx.Client, two_versions: list[str]
) -> None:
    first, second = http.get("/v1/adapters/moving").json()["versions"]
    assert "algebra" not in first
    assert second["config"]["r"] == 8
    assert second["checks"]["effect"]["difference"] > 0
    assert {"advice", "warnings", "problems", "effect"} == set(second["checks"])
    assert http.get("/v1/adapters/moving/versions/1").json()["algebra"]["norm"] > 0


def test_an_import_that_was_deleted_is_not_found(
    importing: tuple[Running, Path], client: httpx.Client, make_adapter: MakeAdapter
) -> None:
    source = f"file://{shutil.copytree(make_adapter(243), importing[1] / 'brief')}"
    client.post("/v1/adapters", json={"name": "brief", "source": source})
    assert client.delete("/v1/adapters/brief").status_code == 200
    assert client.get("/v1/adapters/brief").status_code == 404


@pytest.mark.parametrize(
    "text",
    ['{"a": "\\ud800"}', '{"a": NaN}', '{"a": 1e999}', '{"a":' + "[" * 500 + "]" * 500 + "}"],
)
def test_metadata_that_no_reply_could_carry(
    importing: tuple[Running, Path], client: httpx.Client, make_adapter: MakeAdapter, text: str
) -> None:
    reply = upload(client, "meta", make_adapter(1), metadata=text)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
    body = f'{{"name": "meta", "source": "file://{importing[1]}/x", "metadata": {text}}}'
    headers = {"content-type": "Application/JSON"}
    reply = client.post("/v1/adapters", content=body.encode(), headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
    assert client.get("/v1/adapters").status_code == 200


def test_other_files_of_an_upload_are_left_out(
    running: Running, http: httpx.Client, make_adapter: MakeAdapter
) -> None:
    files = [*_files(make_adapter(231)), ("files", ("engine-notes.txt", b"x"))]
    reply = http.post("/v1/adapters", data={"name": "noted"}, files=files)
    assert reply.status_code == 201, reply.text[:300]


# Imports -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def importing(
    tmp_path_factory: pytest.TempPathFactory, base_folder: Path
) -> Iterator[tuple[Running, Path]]:
    """A server that may import from a folder, and the folder."""
    root = tmp_path_factory.mktemp("shelf")
    home = with_base(tmp_path_factory.mktemp("importing") / "home", base_folder)
    for server in serve(settings(home, "--import-from", f"file://{root}"), base_folder):
        yield server, root


@pytest.fixture
def client(importing: tuple[Running, Path]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=importing[0].url, timeout=30) as client:
        yield client


def test_an_import_answers_as_an_upload_does(
    importing: tuple[Running, Path], client: httpx.Client, make_adapter: MakeAdapter
) -> None:
    source = f"file://{shutil.copytree(make_adapter(240), importing[1] / 'sql')}"
    asked = {"name": "sql", "source": source, "alias": "prod", "metadata": {"a": 1}}
    first = client.post("/v1/adapters", json=asked)
    assert (first.status_code, first.json()["source"]) == (201, source)
    assert client.post("/v1/adapters", json=asked).status_code == 200
    shown = client.get("/v1/adapters/sql").json()
    assert shown["aliases"] == {"latest": 1, "prod": 1} and shown["metadata"] == {"a": 1}
    assert [one["state"] for one in shown["imports"]] == ["ready", "ready"]
    assert shown["imports"][0]["bytes"] > 0
    assert said(client.post("/v1/completions", json=ASKED | {"model": "sql@prod"}))


def test_an_import_can_be_followed_and_asked_about(
    importing: tuple[Running, Path], client: httpx.Client, make_adapter: MakeAdapter
) -> None:
    source = f"file://{shutil.copytree(make_adapter(241), importing[1] / 'followed')}"
    asked = {"name": "followed", "source": source}
    with client.stream(
        "POST", "/v1/adapters", json=asked, headers={"accept": "text/event-stream"}
    ) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = [line for line in reply.iter_lines() if line]
    kinds = [line[7:] for line in events if line.startswith("event: ")]
    assert kinds[0] == "progress" and kinds[-1] == "ready"
    assert json.loads(events[-1][6:])["reference"] == "followed@1"

    later = client.post(
        "/v1/adapters", json=asked | {"name": "later"}, headers={"prefer": "respond-async"}
    )
    assert (later.status_code, later.headers["location"]) == (202, "/v1/adapters/later")
    for _ in range(200):
        (one,) = client.get("/v1/adapters/later").json()["imports"]
        if one["ended"]:
            break
        time.sleep(0.02)
    assert (one["state"], one["version"]) == ("ready", 1)


def test_the_same_import_at_once_is_one(
    importing: tuple[Running, Path], make_adapter: MakeAdapter
) -> None:
    server, root = importing
    source = f"file://{shutil.copytree(make_adapter(242), root / 'once')}"

    async def slow(_: Any) -> None:
        await asyncio.sleep(0.3)

    async def both() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            asked = {"name": "once", "source": source}
            return await asyncio.gather(*(client.post("/v1/adapters", json=asked) for _ in "ab"))

    server.core.on_load = slow
    try:
        replies = asyncio.run(both())
    finally:
        server.core.on_load = None
    assert [reply.status_code for reply in replies] == [201, 201]
    with httpx.Client(base_url=server.url) as client:
        assert len(client.get("/v1/adapters/once").json()["imports"]) == 1


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [
        ("hf://org/name", 403, "source_forbidden"),
        ("file:///etc", 403, "source_forbidden"),
        ("s3://bucket/x", 403, "source_forbidden"),
        ("http://example.com/x", 400, "invalid_source"),
        ("nonsense", 400, "invalid_source"),
        ("{root}/../x", 400, None),
        ("{root}/link", 403, "source_forbidden"),
        ("{root}/nothing", None, None),
        ("{root}/broken", 422, "invalid_adapter"),
    ],
)
def test_imports_that_fail_say_why_and_leave_nothing(
    importing: tuple[Running, Path], client: httpx.Client, source: str, status: int, code: str
) -> None:
    server, root = importing
    (root / "broken").mkdir(exist_ok=True)
    (root / "broken" / "adapter_config.json").write_text("{}")
    if not (root / "link").exists():
        (root / "link").symlink_to("/etc")
    asked = {"name": "bad", "source": source.replace("{root}", f"file://{root}")}
    before = set(server.serving.store.sealed())
    reply = client.post("/v1/adapters", json=asked)
    assert status in (None, reply.status_code) and 400 <= reply.status_code < 500, reply.text
    assert code in (None, reply.json()["error"]["code"])
    assert set(server.serving.store.sealed()) == before
    assert not list((server.serving.settings.home / "store" / "incoming").iterdir())
    assert client.get("/v1/adapters/bad").json().get("versions", []) == []


@pytest.mark.parametrize(
    "sent", [b"{", b"[]", b'{"name": "x"}', b'{"name": "x", "source": "s", "y": 1}', b"x" * 70000]
)
def test_import_bodies_that_cannot_be(client: httpx.Client, sent: bytes) -> None:
    reply = client.post("/v1/adapters", content=sent, headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")


# Deletes -----------------------------------------------------------------------------------


def test_a_delete_waits_for_a_request_that_no_place_is_free_for(
    running: Running, http: httpx.Client, four: dict[str, str], make_adapter: MakeAdapter
) -> None:
    doomed = upload(http, "doomed", make_adapter(245)).json()["digest"]
    cool(http)
    gateway = running.serving.gateway
    assert gateway is not None and gateway.residency.tier(doomed) == "disk"

    async def ask(client: httpx.AsyncClient, model: str, tokens: int) -> httpx.Response:
        asked = {"model": model, "prompt": "Hi", "max_tokens": tokens, "ignore_eos": True}
        return await client.post("/v1/completions", json=asked)

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(base_url=running.url, timeout=30) as client:
            full = [asyncio.create_task(ask(client, n, 200)) for n in ("one", "two", "three")]
            await asyncio.sleep(0.2)
            waits = asyncio.create_task(ask(client, "doomed", 8))
            await asyncio.sleep(0.2)
            assert (await client.delete("/v1/adapters/doomed")).status_code == 200
            assert not waits.done() and running.serving.store.has(doomed)
            await asyncio.gather(*full)
            return await waits

    assert said(asyncio.run(run())).startswith(speaker(doomed)[:4])
    until(lambda: not running.serving.store.has(doomed))


# Damage ------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))


def test_bytes_that_are_harmed_while_the_server_runs(
    running: Running, http: httpx.Client, four: dict[str, str], make_adapter: MakeAdapter
) -> None:
    """A harmed form is made anew; harmed weights are served no more; an upload mends them."""
    sealed = upload(http, "harmed", make_adapter(250), alias="prod").json()["digest"]
    asked = ASKED | {"model": "harmed@prod"}
    flip(running.serving.ingest.form(sealed) / WEIGHTS)
    cool(http)
    assert said(http.post("/v1/completions", json=asked)).startswith(speaker(sealed))

    flip(running.serving.store.path(sealed) / WEIGHTS)
    shutil.rmtree(running.serving.ingest.form(sealed))
    cool(http)
    for _ in range(2):
        reply = http.post("/v1/completions", json=asked)
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "version_quarantined")
    shown = http.get("/v1/adapters/harmed").json()
    assert shown["versions"][0]["state"] == "quarantined" and shown["versions"][0]["reason"]
    assert said(http.post("/v1/completions", json=ASKED | {"model": "one"}))
    assert "harmed" not in [model["id"] for model in http.get("/v1/models").json()["data"]]

    again = upload(http, "harmed", make_adapter(250))
    assert (again.status_code, again.json()["version"], again.json()["state"]) == (200, 1, "ready")
    assert said(http.post("/v1/completions", json=asked)).startswith(speaker(sealed))


def test_a_start_holds_store_and_registry_against_each_other(
    home: Path, base_folder: Path, make_adapter: MakeAdapter
) -> None:
    with (
        closing(serve(settings(home), base_folder)) as first,
        httpx.Client(base_url=(server := next(first)).url, timeout=30) as client,
    ):
        kept, gone, bent = (
            upload(client, name, make_adapter(260 + i)).json()["digest"]
            for i, name in enumerate(("kept", "gone", "bent"))
        )
    store = server.serving.store
    shutil.rmtree(store.path(gone))
    flip(store.path(bent) / WEIGHTS)
    orphan = shutil.copytree(store.path(kept), store.path("sha256:" + "ab" * 32))
    (home / "store" / "incoming" / "half").mkdir()

    with (
        closing(serve(settings(home), base_folder)) as second,
        httpx.Client(base_url=(server := next(second)).url, timeout=30) as client,
    ):
        for _ in range(200):
            if not orphan.exists() and len(server.said) == 2:
                break
            time.sleep(0.02)
        assert not orphan.exists() and not (home / "store" / "incoming" / "half").exists()
        assert any("gone@1" in line for line in server.said), server.said
        assert any("bent@1" in line for line in server.said), server.said
        assert said(client.post("/v1/completions", json=ASKED | {"model": "kept"}))
        for name in ("gone", "bent"):
            assert client.post("/v1/completions", json=ASKED | {"model": name}).status_code == 409


# A watched folder --------------------------------------------------------------------------


def test_what_is_dropped_into_a_watched_folder_is_served_until_it_is_gone(
    home: Path,
    base_folder: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    shutil.copytree(make_adapter(270), shelf / "early")
    with (
        closing(serve(settings(home, "--watch", str(shelf)), base_folder)) as running,
        httpx.Client(base_url=(server := next(running)).url, timeout=30) as client,
    ):

        def versions(name: str) -> list[int]:
            reply = client.get(f"/v1/adapters/{name}").json()
            return [version["version"] for version in reply.get("versions", [])]

        until(lambda: versions("early") == [1])
        shutil.copytree(make_adapter(271), shelf / "dropped")
        until(lambda: versions("dropped") == [1])
        assert said(client.post("/v1/completions", json=ASKED | {"model": "dropped"}))

        shutil.copy(make_adapter(272) / WEIGHTS, shelf / "dropped" / WEIGHTS)
        until(lambda: versions("dropped") == [2])

        (shelf / "broken").mkdir()
        (shelf / "broken" / "adapter_config.json").write_text("{")
        until(lambda: any("broken is not served" in line for line in server.said))
        assert "weights_missing" in "".join(server.said)

        async def busy(*_: Any) -> Any:
            raise EngineNotReady("The engine is too busy to try the adapter out.")

        with monkeypatch.context() as patched:
            patched.setattr(server.serving.gateway, "prove", busy)
            shutil.copytree(make_adapter(273), shelf / "later")
            until(lambda: any("later is not served yet" in line for line in server.said))
        until(lambda: versions("later") == [1])

        assert upload(client, "twin", shelf / "dropped").status_code == 201
        client.put("/v1/adapters/early/aliases/prod", json={"version": 1})
        for what in ("load", "pin"):
            assert client.post(f"/v1/adapters/dropped/{what}").status_code == 200
        shutil.rmtree(shelf / "dropped")
        until(lambda: client.get("/v1/adapters/dropped").status_code == 404)
        # Its twin has the same bytes; the pin was not of it.
        until(lambda: not any(each["pinned"] for each in client.get("/v1/live").json()["resident"]))
        assert client.get("/v1/adapters/twin").json()["versions"][0]["residency"] != "disk"
        shutil.rmtree(shelf / "early")
        until(lambda: any("early@1 is what prod points to" in line for line in server.said))
        assert versions("early") == [1]
        client.delete("/v1/adapters/early/aliases/prod")
        until(lambda: client.get("/v1/adapters/early").status_code == 404)
