"""Who may call what: every route, with keys of every scope, and without."""

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.keys import SCOPES
from server.routes.access import ACCESS, PUBLIC
from tests.conftest import MakeAdapter, with_base
from tests.http.conftest import Running, serve, settings, upload

ADMIN_KEY = "the-operators-own-key"
Ask = Any  # ask(*scopes, **fields) → a client with a key of its own

GUARDED = sorted(route for route, scope in ACCESS.items() if scope is not PUBLIC)
NAMED = [route for route in GUARDED if "{name" in route[1]]


@pytest.fixture(scope="module")
def guarded(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that wants keys."""
    home = with_base(tmp_path_factory.mktemp("guarded") / "home", base_folder)
    yield from serve(settings(home, "--admin-key", ADMIN_KEY), base_folder)


def client(running: Running, token: str | None) -> httpx.Client:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    return httpx.Client(base_url=running.url, timeout=30, headers=headers)


@pytest.fixture(scope="module")
def admin(guarded: Running) -> Iterator[httpx.Client]:
    with client(guarded, ADMIN_KEY) as them:
        yield them


@pytest.fixture
def ask(guarded: Running, admin: httpx.Client) -> Iterator[Ask]:
    """`ask("infer", adapters=["a.*"])`: a client with a new key that may do just that."""
    clients = []

    def make(*scopes: str, **fields: Any) -> httpx.Client:
        made = admin.post("/v1/keys", json={"name": "test", "scopes": scopes, **fields})
        assert made.status_code == 201, made.text
        clients.append(client(guarded, made.json()["key"]))
        return clients[-1]

    yield make
    for each in clients:
        each.close()


@pytest.fixture(scope="module")
def theirs(admin: httpx.Client, make_adapter: MakeAdapter) -> str:
    """An adapter of somebody else."""
    assert upload(admin, "b.theirs", make_adapter(1)).status_code in (200, 201)
    return "b.theirs"


def call(them: httpx.Client, method: str, path: str, name: str = "nobody") -> httpx.Response:
    path = path.replace("{name:path}", name).replace("{name}", name)
    path = path.replace("{file}", "index.html")
    path = re.sub(r"\{\w+\}", "1", path)
    body = {"version": 1} if method == "PUT" else {}
    return them.request(method, path, json=body if method in ("PUT", "POST") else None)


def test_every_route_is_in_the_table(guarded: Running) -> None:
    """Nor is anything else: vLLM's own routers would bring calls that nobody should reach."""
    routes = {
        (method, route.path) for route in guarded.app.routes for method in route.methods - {"HEAD"}
    }
    assert routes == set(ACCESS)


def test_public_calls_need_no_key(guarded: Running) -> None:
    with client(guarded, None) as them:
        for method, path in ACCESS.keys() - set(GUARDED):
            assert call(them, method, path).status_code == 200, path
        assert them.head("/openapi.json").status_code == 200


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize(
    "token", [None, "", "lpx_", "lpx_0123456789ab_guess", "ключ", ADMIN_KEY[:-1]]
)
def test_no_call_without_a_key_that_holds(
    guarded: Running, method: str, path: str, token: str | None
) -> None:
    with client(guarded, None) as them:
        if token is not None:
            sent = httpx.Headers([(b"authorization", f"Bearer {token}".strip().encode())])
            them.headers = sent
        reply = call(them, method, path)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        if not path.startswith("/v1/messages"):
            assert reply.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_no_call_without_its_scope(ask: Ask, method: str, path: str) -> None:
    needed = ACCESS[method, path]
    others = [scope for scope in SCOPES if scope not in (needed, "admin")]
    assert call(ask(*others), method, path).status_code == 403
    assert call(ask(needed), method, path).status_code not in (401, 403)
    assert call(ask("admin"), method, path).status_code not in (401, 403)


def test_a_key_is_asked_for_before_the_body_is_there(guarded: Running) -> None:
    port = int(guarded.url.rpartition(":")[2])
    head = "POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(head.encode())
        assert raw.recv(12) == b"HTTP/1.1 401"


def test_anthropics_header_is_a_key_too(guarded: Running) -> None:
    with client(guarded, None) as them:
        them.headers["x-api-key"] = ADMIN_KEY
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        assert them.post("/v1/messages", json=body).status_code == 200
        del them.headers["x-api-key"]
        refused = them.post("/v1/messages", json=body).json()
        assert (refused["type"], refused["error"]["type"]) == ("error", "authentication_error")


@pytest.mark.parametrize(("method", "path"), NAMED)
def test_anothers_adapter_is_not_there(ask: Ask, theirs: str, method: str, path: str) -> None:
    """Word for word what is said of one that does not exist."""
    scope = ACCESS[method, path]
    if scope == "admin":  # which has every adapter
        return
    them = ask(scope, adapters=["a.*", "base"])
    for selector in ("", "@1", "@prod"):
        there = call(them, method, path, theirs + selector)
        missing = call(them, method, path, "b.absent" + selector)
        assert there.status_code == missing.status_code == 404
        assert there.text.replace(theirs, "b.absent") == missing.text


@pytest.mark.parametrize("field", ["adapter", "model"])
def test_anothers_adapter_answers_nothing(ask: Ask, theirs: str, field: str) -> None:
    them = ask("infer", adapters=["a.*", "base"])
    for name in (theirs, f"{theirs}@1"):
        there = them.post("/v1/completions", json={field: name, "prompt": "x"})
        missing = them.post(
            "/v1/completions", json={field: name.replace("theirs", "absent"), "prompt": "x"}
        )
        assert there.status_code == missing.status_code == 404
        assert there.text.replace("theirs", "absent") == missing.text
    assert them.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_vllms_calls_keep_to_the_names_too(ask: Ask, theirs: str) -> None:
    them = ask("adapters:write", adapters=["a.*"])
    gone = them.post("/v1/unload_lora_adapter", json={"lora_name": theirs})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "adapter_not_found")
    body = {"lora_name": theirs, "lora_path": "/srv/x"}
    assert them.post("/v1/load_lora_adapter", json=body).status_code == 403


def test_the_base_is_a_name_like_others(ask: Ask) -> None:
    them = ask("infer", adapters=["a.*"])
    for named in ({}, {"model": "base"}, {"adapter": "base"}, {"model": "smollm2-135m-instruct"}):
        refused = them.post("/v1/completions", json={"prompt": "x", **named})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "adapter_not_found")
    assert them.get("/v1/models/base").status_code == 404


def test_lists_have_only_what_the_key_may_use(
    ask: Ask, admin: httpx.Client, theirs: str, make_adapter: MakeAdapter
) -> None:
    writer = ask("adapters:write", adapters=["a.*"])
    for name in ("a.one", "a.two", "a.xx"):
        assert upload(writer, name, make_adapter(2)).status_code == 201
    reader = ask("adapters:read", "infer", adapters=["a.*o*"])
    assert [each["id"] for each in reader.get("/v1/models").json()["data"]] == ["a.one", "a.two"]
    page = reader.get("/v1/adapters", params={"limit": 1}).json()
    assert ([each["name"] for each in page["data"]], page["has_more"]) == (["a.one"], True)
    page = reader.get("/v1/adapters", params={"limit": 1, "after": page["next"]}).json()
    assert ([each["name"] for each in page["data"]], page["has_more"]) == (["a.two"], False)
    assert len(admin.get("/v1/models").json()["data"]) == 5
    for name in ("a.one", "a.two", "a.xx"):
        assert writer.delete(f"/v1/adapters/{name}").status_code == 200


def test_live_shows_only_what_the_key_may_use(
    ask: Ask, theirs: str, make_adapter: MakeAdapter
) -> None:
    them = ask("adapters:read", "adapters:write", "infer", adapters=["a.*"])
    assert upload(them, "a.mine", make_adapter(5)).status_code == 201
    everybody = ask("infer")
    for name in ("a.mine", theirs, "base"):
        asked = {"model": name, "prompt": "On", "max_tokens": 2}
        assert everybody.post("/v1/completions", json=asked).status_code == 200
    live = them.get("/v1/live").json()
    assert [each["adapter"] for each in live["adapters"]] == ["a.mine"]
    seen = {(each["reference"], each["digest"] is None) for each in live["resident"]}
    assert seen == {("a.mine@1", False), (None, True)}
    assert {event["reference"] for event in live["events"]} == {"a.mine@1"}
    assert {name for each in live["history"] for name in each["adapters"]} == {"a.mine"}
    assert them.delete("/v1/adapters/a.mine").status_code == 200


def test_what_is_brought_is_called_as_the_key_says(
    ask: Ask, theirs: str, make_adapter: MakeAdapter
) -> None:
    them = ask("adapters:write", adapters=["a.*"])
    for name in (theirs, "b.absent"):
        reply = upload(them, name, make_adapter(1))
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "forbidden")
        source = {"name": name, "source": "file:///srv/x"}
        assert them.post("/v1/adapters", json=source).status_code == 403


def test_stored_bytes_are_held_to_the_keys_limit(
    ask: Ask, admin: httpx.Client, make_adapter: MakeAdapter
) -> None:
    first, second = make_adapter(3), make_adapter(4)
    size = (first / "adapter_model.safetensors").stat().st_size
    them = ask("adapters:write", adapters=["q.*"], stored_bytes=size + 1000)
    assert upload(them, "q.one", first).status_code == 201
    refused = upload(them, "q.two", second)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    assert refused.headers["retry-after"]
    assert admin.get("/v1/adapters/q.two").status_code == 404
    assert upload(them, "q.one", first).status_code == 200  # what is there already is no more
    assert them.delete("/v1/adapters/q.one").status_code == 200
    assert upload(them, "q.two", second).status_code == 201
    assert them.delete("/v1/adapters/q.two").status_code == 200


def completion(them: httpx.Client, **more: Any) -> httpx.Response:
    return them.post("/v1/completions", json={"prompt": [1] * 10, "max_tokens": 5, **more})


def limited(reply: httpx.Response) -> int:
    """Seconds until it is worth to ask again."""
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert reply.json()["error"]["type"] == "rate_limit_error"
    return int(reply.headers["retry-after"])


def test_requests_a_minute(ask: Ask) -> None:
    them, others = ask("infer", requests_per_minute=3), ask("infer", requests_per_minute=3)
    for _ in range(3):
        assert them.get("/v1/models").status_code == 200  # to look counts for nothing
        assert completion(them).status_code == 200
    assert 50 < limited(completion(them)) <= 60
    assert them.get("/v1/models").status_code == 200
    assert completion(others).status_code == 200


def test_tokens_a_minute(ask: Ask) -> None:
    them = ask("infer", tokens_per_minute=31)
    assert [completion(them).status_code for _ in range(3)] == [200] * 3  # 15 tokens each
    assert 50 < limited(completion(them)) <= 60


def test_requests_at_once(guarded: Running, ask: Ask) -> None:
    them = ask("infer", concurrent_requests=2)
    guarded.core.hangs = True
    try:
        with ThreadPoolExecutor(2) as pool:
            held = [pool.submit(completion, them) for _ in range(2)]
            while guarded.core.running < 2:
                threading.Event().wait(0.01)
            assert limited(completion(them)) == 1
            guarded.core.hangs = False
            assert [each.result().status_code for each in held] == [200, 200]
    finally:
        guarded.core.hangs = False
    assert completion(them).status_code == 200


def test_a_client_that_goes_gives_back_its_place(guarded: Running, ask: Ask) -> None:
    them = ask("infer", concurrent_requests=1)
    with them.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as reply:
        next(reply.iter_lines())
    for _ in range(100):
        if completion(them).status_code == 200:
            return
        threading.Event().wait(0.05)
    raise AssertionError("the place of a client that went is not given back")


def test_a_key_has_its_share(guarded: Running, ask: Ask) -> None:
    them = ask("infer", weight=3.5)
    assert completion(them).status_code == 200
    assert 3.5 in guarded.gateway.key_weights.values()


def test_the_life_of_a_key(guarded: Running, admin: httpx.Client) -> None:
    made = admin.post("/v1/keys", json={"name": "x", "scopes": ["infer"]}).json()
    first, path = made.pop("key"), f"/v1/keys/{made['id']}"
    assert admin.get(path).json() == made
    assert made in admin.get("/v1/keys").json()["data"]
    second = admin.post(f"{path}/rotate", json={"grace_s": 60}).json()["key"]
    third = admin.post(f"{path}/rotate").json()["key"]
    with client(guarded, first) as old, client(guarded, second) as new:
        assert old.get("/v1/models").status_code == 401
        assert new.get("/v1/models").status_code == 401
    fourth = admin.post(f"{path}/rotate", json={"grace_s": 60}).json()["key"]
    for token in (third, fourth):
        with client(guarded, token) as them:
            assert them.get("/v1/models").status_code == 200
    assert admin.delete(path).json()["revoked"]
    for token in (third, fourth):
        with client(guarded, token) as them:
            assert them.get("/v1/models").status_code == 401
    assert admin.post(f"{path}/rotate").status_code == 400
    assert admin.get("/v1/keys/nobody").status_code == 404
    assert not any(token in admin.get("/v1/keys").text for token in (first, second, third))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", ""), ("name", "a\nb"), ("scopes", []), ("scopes", ["root"])),
        *(("adapters", []), ("adapters", ["A*"]), ("weight", 0), ("stored_bytes", 0)),
        *(("requests_per_minute", -1), ("expires", 1), ("expires", 10**15), ("other", 1)),
    ],
)
def test_a_key_that_makes_no_sense(admin: httpx.Client, field: str, value: Any) -> None:
    reply = admin.post("/v1/keys", json={"name": "x", "scopes": ["infer"], field: value})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def keys(home: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "server.cli", "keys", *arguments, "--home", str(home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_the_first_key_is_wanted_from_then_on(base_folder: Path, home: Path) -> None:
    """Made beside a running server, which until then answered anybody on this machine."""
    for running in serve(settings(home), base_folder):
        with client(running, None) as anybody:
            assert anybody.get("/v1/models").status_code == 200
            token = keys(home, "create", "ci", "--scope", "infer")
            assert anybody.get("/v1/models").status_code == 401
            with client(running, token) as them:
                assert them.get("/v1/models").status_code == 200
                (id,) = re.findall(r"lpx_(\w+?)_", token)
                keys(home, "revoke", id)
                assert them.get("/v1/models").status_code == 401
            assert anybody.get("/v1/models").status_code == 401  # not open again


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:9"}, 200),
        ({"host": "[::1]"}, 200),
        ({"origin": "http://localhost:3000"}, 200),
        ({"host": "evil.example"}, 403),  # a name that was made to mean this machine
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"origin": "https://evil.example"}, 403),  # a page that somebody here looks at
        ({"origin": "null"}, 403),
    ],
)
def test_without_keys_only_this_machine_may_ask(
    http: httpx.Client, headers: dict[str, str], status: int
) -> None:
    assert http.get("/v1/models", headers=headers).status_code == status
    assert http.get("/health", headers=headers).status_code == 200


def test_metrics_can_be_opened(guarded: Running) -> None:
    with client(guarded, None) as them:
        assert them.get("/metrics").status_code == 401
        before = guarded.serving.settings
        guarded.serving.settings = before.model_copy(update={"metrics_without_key": True})
        assert them.get("/metrics").status_code == 200
        guarded.serving.settings = before
