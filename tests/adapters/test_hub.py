from __future__ import annotations

import json
import os
import socket
import threading
import time

import httpx2
import pytest
from huggingface_hub import constants

from adapters.errors import (
    AdapterError,
    ImportStopped,
    ImportTimeout,
    InvalidAdapter,
    SourceFailed,
    SourceForbidden,
    SourceNotFound,
    TooLarge,
)
from adapters.sources import fetch as fetch_allowed
from adapters.sources import hub, remote
from adapters.sources.address import Address, Allowed
from adapters.sources.hub import fetch
from adapters.sources.intake import Transfer
from tests.adapters.hub_server import COMMIT, REPO, Hub

CONFIG = b'{"r": 8}'
WEIGHTS = os.urandom(200_000)
BOTH = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
TOTAL = len(CONFIG) + len(WEIGHTS)
INFO = f"/api/models/{REPO}"
FILES = f"/{REPO}/resolve/{COMMIT}/"
WEIGHTS_PATH = FILES + "adapter_model.safetensors"
TOKEN = "hf_of_the_operator"


@pytest.fixture(autouse=True)
def quick_and_local(monkeypatch):
    """Short pauses, no settings of this machine, and no way out of it."""
    connect = socket.socket.connect

    def local(self, address):
        assert address[0] == "127.0.0.1", f"a connection to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)
    monkeypatch.setattr(hub, "TIMEOUT_S", 5.0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def into(tmp_path):
    folder = tmp_path / "into"
    folder.mkdir()
    return folder


@pytest.fixture
def server():
    with Hub({**BOTH, "README.md": b"x", "deep/er/notes.txt": b"x"}) as running:
        yield running


@pytest.fixture
def refused(into, server):
    """Runs a fetch that fails and leaves nothing; the error."""

    def run(kind: type[AdapterError], text=f"hf://{REPO}", transfer=None, **more) -> AdapterError:
        with pytest.raises(kind) as raised:
            more.setdefault("endpoint", server.url)
            fetch(Address.parse(text), into, transfer or Transfer(10**6), **more)
        assert type(raised.value) is kind
        assert os.listdir(into) == []
        assert "\n" not in raised.value.message
        assert TOKEN not in raised.value.message
        return raised.value

    return run


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_the_two_files_and_the_commit(server, into):
    transfer = Transfer(10**6)
    source = fetch(Address.parse(f"hf://{REPO}"), into, transfer, endpoint=server.url + "/")
    assert source == f"hf://{REPO}@{COMMIT}"
    assert contents(into) == BOTH
    assert (transfer.total, transfer.done) == (TOTAL, TOTAL)
    assert server.asked() == [INFO, FILES + "adapter_config.json", WEIGHTS_PATH]


@pytest.mark.parametrize("revision", ["v1", "refs%2Fpr%2F1", COMMIT])
def test_a_revision_and_a_folder(server, into, revision):
    server.files = {f"a/b c/{name}": content for name, content in BOTH.items()}
    address = Address.parse(f"hf://{REPO}@{revision}/a/b c")
    source = fetch(address, into, Transfer(10**6), endpoint=server.url)
    assert source == f"hf://{REPO}@{COMMIT}/a/b c"
    assert contents(into) == BOTH
    assert server.asked()[0] == f"{INFO}/revision/{revision}"
    server.seen.clear()
    for path in into.iterdir():
        path.unlink()
    assert fetch(Address.parse(source), into, Transfer(10**6), endpoint=server.url) == source


def test_the_endpoint_of_the_environment(server, into, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    address = Address.parse(f"hf://{REPO}")
    source = fetch_allowed(address, into, Transfer(10**6), Allowed(["hf://org"]))
    assert source == f"hf://{REPO}@{COMMIT}"
    assert contents(into) == BOTH
    server.seen.clear()
    with pytest.raises(SourceForbidden):
        fetch_allowed(address, into, Transfer(10**6), Allowed(["hf://org-2"]))
    assert server.seen == []


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_broken_connection_is_gone_on_with(server, into, knows_ranges):
    server.drops = [50_000, 20_000, 0]
    server.knows_ranges = knows_ranges
    transfer = Transfer(10**6)
    fetch(Address.parse(f"hf://{REPO}"), into, transfer, endpoint=server.url)
    assert contents(into) == BOTH
    assert transfer.done == TOTAL
    ranges = [headers.get("range") for path, headers in server.seen if path == WEIGHTS_PATH]
    reached = "bytes=70000-" if knows_ranges else "bytes=50000-"
    assert ranges == [None, "bytes=50000-", reached, reached]


def test_it_is_given_up_after_five_attempts_without_a_byte(server, refused):
    server.drops = [50_000] + [0] * 20
    error = refused(SourceFailed)
    assert "5 attempts" in error.message
    assert server.asked().count(WEIGHTS_PATH) == 5


@pytest.mark.parametrize(("size", "how"), [(TOTAL, "fewer"), (100, "more")])
def test_sizes_that_are_not_true(server, refused, size, how):
    server.sizes["adapter_model.safetensors"] = size
    assert f"has {how} bytes" in refused(SourceFailed).message


def test_a_file_that_never_ends(server, refused):
    server.endless = True
    assert "more bytes" in refused(SourceFailed).message


def test_other_bytes_than_announced(server, refused):
    server.sha256 = "0" * 64
    assert "other bytes" in refused(SourceFailed).message


def test_what_is_too_large_is_not_begun(server, refused):
    server.sizes["adapter_model.safetensors"] = 10**7
    refused(TooLarge)
    assert server.asked() == [INFO]


@pytest.mark.parametrize("moved", [INFO, WEIGHTS_PATH])
def test_redirects_on_the_endpoint_are_followed(server, into, moved):
    server.redirects[moved] = "/elsewhere"
    server.redirects["/elsewhere"] = server.url + "/content/adapter_model.safetensors"
    if moved == INFO:
        server.redirects["/elsewhere"] = f"{INFO}/revision/main"
    fetch(Address.parse(f"hf://{REPO}"), into, Transfer(10**6), endpoint=server.url)
    assert contents(into) == BOTH


@pytest.mark.parametrize("moved", [INFO, WEIGHTS_PATH])
@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/x",
        "//localhost/x",
        "http://[::1]/x",
        "https://127.0.0.1/x",
        "http://huggingface.co/x",
        "https://huggingface.co:8443/x",
        "https://huggingface.co.example.com/x",
        "https://nothuggingface.co/x",
        "https://example.com/huggingface.co",
        "https://me@hf.co/x",
        "https://example.com#.hf.co/",
        "ftp://hf.co/x",
        "file:///etc/passwd",
    ],
)
def test_redirects_to_other_hosts_are_not_followed(server, refused, moved, location):
    server.redirects[moved] = location
    refused(SourceForbidden)
    assert server.asked()[-1] == moved


def test_redirects_to_another_port_are_not_followed(server, refused):
    with Hub(BOTH) as other:
        server.redirects[WEIGHTS_PATH] = f"{other.url}/content/adapter_model.safetensors"
        refused(SourceForbidden)
        assert other.seen == []


@pytest.mark.parametrize("location", ["http://[", "http://a:b:c/", "https://\u200b.hf.co/"])
def test_redirects_to_nonsense(server, into, location):
    server.redirects[WEIGHTS_PATH] = location.encode().decode("latin-1")
    with pytest.raises((SourceFailed, SourceForbidden)):
        fetch(Address.parse(f"hf://{REPO}"), into, Transfer(10**6), endpoint=server.url)
    assert os.listdir(into) == []


def test_redirects_in_a_circle(server, refused):
    server.redirects[WEIGHTS_PATH] = WEIGHTS_PATH
    assert "without end" in refused(SourceFailed).message
    assert server.asked().count(WEIGHTS_PATH) == 6


def test_the_token_opens_what_is_private(server, into, refused, monkeypatch):
    server.token = "another"
    assert "HF_TOKEN" in refused(SourceNotFound).message
    server.token = TOKEN
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    refused(SourceNotFound)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    fetch(Address.parse(f"hf://{REPO}"), into, Transfer(10**6), endpoint=server.url)
    assert contents(into) == BOTH


@pytest.mark.parametrize("host", ["cdn-lfs.hf.co", "huggingface.co", "hf.co", "a.b.huggingface.co"])
def test_the_token_goes_to_no_content_host(into, monkeypatch, host):
    answers = Hub(BOTH)
    sent = {}

    def respond(request: httpx2.Request) -> httpx2.Response:
        sent[request.url.host] = request.headers.get("authorization")
        name = request.url.path.rpartition("/")[2]
        if request.url.path == INFO or request.url.host == host:
            content = BOTH.get(name, json.dumps(answers.info()).encode())
            return httpx2.Response(200, stream=httpx2.ByteStream(content))
        return httpx2.Response(302, headers={"location": f"https://{host}/{name}?signature"})

    client = httpx2.Client
    monkeypatch.setattr(
        httpx2, "Client", lambda **more: client(**more, transport=httpx2.MockTransport(respond))
    )
    fetch(Address.parse(f"hf://{REPO}"), into, Transfer(10**6), endpoint="https://hub.test")
    assert contents(into) == BOTH
    assert sent == {"hub.test": f"Bearer {TOKEN}", host: None}


@pytest.mark.parametrize("path", [INFO, WEIGHTS_PATH])
@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, "", SourceNotFound),
        (404, "RepoNotFound", SourceNotFound),
        (404, "RevisionNotFound", SourceNotFound),
        (404, "EntryNotFound", SourceNotFound),
        (403, "GatedRepo", SourceForbidden),
        (403, "", SourceForbidden),
        (429, "", SourceFailed),
        (503, "", SourceFailed),
        (416, "", SourceFailed),
        (418, "", SourceFailed),
        (304, "", SourceFailed),
    ],
)
def test_refusals(server, refused, path, status, code, kind):
    server.refusals[path] = status, code
    refused(kind)
    assert server.asked().count(path) == (5 if status in (429, 503) else 1)


def test_a_revision_or_folder_that_is_not_there(refused):
    assert "at v9" in refused(SourceNotFound, f"hf://{REPO}@v9").message
    assert "no folder deep at v1" in refused(SourceNotFound, f"hf://{REPO}@v1/deep").message
    refused(SourceNotFound, "hf://org/other")


def test_another_repository_under_a_former_name(server, refused):
    server.name = "evil/sql"
    assert "evil/sql" in refused(SourceNotFound).message
    assert server.asked() == [INFO]


def test_pickles(server, into, refused):
    server.files = {"adapter_config.json": CONFIG, "adapter_model.bin": b"pickle"}
    assert refused(InvalidAdapter).problems[0].code == "pickle_refused"
    address = Address.parse(f"hf://{REPO}")
    fetch(address, into, Transfer(10**6), allow_pickle=True, endpoint=server.url)
    assert contents(into) == server.files


@pytest.mark.parametrize(
    "answer",
    [
        b"[]",
        b"{",
        b"\xff",
        b"{}",
        b'{"id": "org/sql", "sha": "main", "siblings": []}',
        b'{"id": "org/sql", "sha": 3, "siblings": 3}',
        b'{"id": "org/sql", "sha": "%s", "siblings": [3]}' % COMMIT.encode(),
        b'{"id": "org/sql", "sha": "%s", "siblings": [{"rfilename": "x"}]}' % COMMIT.encode(),
        b'{"id": "org/sql", "sha": "%s", "siblings": [{"rfilename": "x", "size": -1}]}'
        % COMMIT.encode(),
        b'{"id": "org/sql", "sha": "%s", "siblings": [{"rfilename": "x", "size": 1, "lfs": 1}]}'
        % COMMIT.encode(),
        b'{"id": "org/sql", "sha": "%s", "siblings": [{"rfilename": 7, "size": 1}]}'
        % COMMIT.encode(),
    ],
)
def test_answers_that_make_no_sense(server, refused, answer):
    server.answer = answer
    refused(SourceFailed)


def test_an_answer_without_end(server, refused, monkeypatch):
    monkeypatch.setattr(hub, "_MAX_ANSWER", 1000)
    server.answer = b"[" * 2000
    assert "too many files" in refused(SourceFailed).message


def test_stop_and_timeout(server, refused):
    server.pause_s = 0.1
    transfer = Transfer(10**6)
    threading.Timer(0.3, transfer.stop).start()
    began = time.monotonic()
    refused(ImportStopped, transfer=transfer)
    refused(ImportTimeout, transfer=Transfer(10**6, timeout_s=0.3))
    assert time.monotonic() - began < 5


def test_a_silent_hub_and_none_at_all(refused, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        refused(ImportTimeout, transfer=Transfer(10**6, timeout_s=0.3), endpoint=url)
    assert "lost or not had" in refused(SourceFailed, endpoint=url).message


@pytest.mark.parametrize("endpoint", ["http://[", "http://a:b:c", "hub.example.com", "ftp://x", ""])
def test_an_endpoint_that_is_none(refused, monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    refused(SourceFailed, endpoint=endpoint)


def test_a_stop_is_heard_between_attempts(server, refused, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_S", 30)
    server.refusals[INFO] = 503, ""
    transfer = Transfer(10**6)
    threading.Timer(0.2, transfer.stop).start()
    refused(ImportStopped, transfer=transfer)


def test_offline(server, refused, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(SourceForbidden)
    assert server.seen == []
