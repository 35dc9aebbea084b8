"""The commands that ask a server, against one: what they say, on a terminal and off it."""

import io
import itertools
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from server import cli
from server.commands import talk
from server.commands import upload as sending
from tests import fake_engine
from tests.conftest import MakeAdapter
from tests.fake_engine import speaker
from tests.http.conftest import Running, cool, nothing_is_left, serve, settings, upload
from tests.terminal import Terminal

Loraplex = Callable[..., SimpleNamespace]
COUNT = itertools.count(1)
SAID = " has read your words and says hello"


@pytest.fixture
def loraplex(
    running: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Loraplex:
    """`loraplex(…)`: a command in this process, for the running server: code, out, err."""

    def run(*arguments: str, stdin: str = "", **environment: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["loraplex", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        for name, value in {"LORAPLEX_URL": running.url, "COLUMNS": "100", **environment}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=said.out, err=said.err)

    return run


@pytest.fixture
def folder(make_adapter: MakeAdapter, tmp_path: Path) -> Path:
    """An adapter's folder, called as none was before: numbers of versions are not given again."""
    return Path(shutil.copytree(make_adapter(70), tmp_path / f"mine-{next(COUNT)}"))


@pytest.fixture
def mine(http: httpx.Client, folder: Path) -> Iterator[str]:
    """One with a version 1, which is `prod`, on the server, and nothing of it afterwards."""
    assert upload(http, folder.name, folder, alias="prod").status_code == 201
    yield folder.name
    http.delete(f"/v1/adapters/{folder.name}")


# Bringing adapters in -----------------------------------------------------------------------


def test_add_a_folder(loraplex: Loraplex, http: httpx.Client, folder: Path) -> None:
    done = loraplex("adapters", "add", str(folder), "--alias", "prod", "--metadata", '{"a": 1}')
    assert (done.code, done.out) == (0, f"{folder.name}@1\n"), done.err
    assert "new: it can be asked at once" in done.err
    shown = http.get(f"/v1/adapters/{folder.name}").json()
    assert (shown["aliases"], shown["metadata"]) == ({"latest": 1, "prod": 1}, {"a": 1})
    again = loraplex("adapters", "add", str(folder))
    assert (again.code, again.out) == (0, f"{folder.name}@1\n")
    assert "not new: it has these very bytes already" in again.err
    told = json.loads(loraplex("adapters", "add", str(folder), "--json").out)
    assert (told["reference"], told["new"]) == (f"{folder.name}@1", False)
    http.delete(f"/v1/adapters/{folder.name}")


def test_add_an_archive(loraplex: Loraplex, http: httpx.Client, folder: Path) -> None:
    packed = shutil.make_archive(str(folder.parent / "packed"), "gztar", folder.parent, folder.name)
    done = loraplex("adapters", "add", packed)
    assert (done.code, done.out) == (0, "packed@1\n"), done.err
    http.delete("/v1/adapters/packed")


def test_what_is_uploaded_is_read_in_pieces(
    loraplex: Loraplex, http: httpx.Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    read = sending._Sent.read

    def counted(self: Any, size: int) -> bytes:
        block = read(self, size)
        sizes.append(len(block))
        return block

    monkeypatch.setattr(sending._Sent, "read", counted)
    assert loraplex("adapters", "add", str(folder)).code == 0
    whole = sum(file.stat().st_size for file in folder.glob("adapter_*"))
    assert sum(sizes) == whole and max(sizes) <= 2**16 < whole / 10
    http.delete(f"/v1/adapters/{folder.name}")


def test_an_upload_shows_how_far_it_is(running: Running, http: httpx.Client, folder: Path) -> None:
    with Terminal("adapters", "add", str(folder), LORAPLEX_URL=running.url) as screen:
        screen.see(f"{folder.name}@1")
        assert screen.end() == 0
        assert "uploading" in screen.text or "checking" in screen.text
        assert " MB" in screen.text and "/s" in screen.text
    http.delete(f"/v1/adapters/{folder.name}")


def test_a_refusal_says_every_reason_and_what_to_do(loraplex: Loraplex, folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True, "r": 128}))
    done = loraplex("adapters", "add", str(folder))
    assert (done.code, done.out) == (1, "")
    assert "refused, for 3 reasons:" in done.err
    for said in ("dora  use_dora", "→ Train it with use_dora=False.", "rank_above_max"):
        assert said in done.err
    told = loraplex("adapters", "add", str(folder), "--json")
    codes = [each["code"] for each in json.loads(told.out)["error"]["problems"]]
    assert told.code == 1 and codes == ["dora", "rank_not_as_configured", "rank_above_max"]


def test_what_is_missing_is_said_before_anything_is_sent(
    loraplex: Loraplex, tmp_path: Path
) -> None:
    done = loraplex("adapters", "add", str(tmp_path), "--name", "x", LORAPLEX_URL="http://[::1]:1")
    assert done.code == 1
    assert "config_missing" in done.err and "weights_missing" in done.err


def test_an_import(loraplex: Loraplex, base_folder: Path, tmp_path: Path, folder: Path) -> None:
    home = tmp_path / "importing"
    server = serve(settings(home, "--import-from", f"file://{tmp_path}"), base_folder)
    running = next(server)
    try:
        where = {"LORAPLEX_URL": running.url}
        done = loraplex("adapters", "add", f"file://{folder}", "--alias", "a", **where)
        assert (done.code, done.out) == (0, f"{folder.name}@1\n"), done.err
        assert done.err.startswith("new: ")
        again = loraplex("adapters", "add", f"file://{folder}", "--json", **where)
        assert not json.loads(again.out)["new"]
        gone = loraplex("adapters", "add", f"file://{tmp_path}/nothing", **where)
        assert gone.code == 1 and "nothing" in gone.err
        refused = loraplex("adapters", "add", "hf://org/name", **where)
        assert refused.code == 1 and "--import-from" in refused.err
        with Terminal("adapters", "add", f"file://{folder}", "--name", "b", **where) as screen:
            screen.see("b@1")
            assert screen.end() == 0
            assert " MB" in screen.text
    finally:
        server.close()


def test_check_asks_the_server_that_is_named(loraplex: Loraplex, folder: Path) -> None:
    done = loraplex("adapters", "check", str(folder))
    assert done.code == 0 and "It can be served." in done.out and "rank_99" in done.out
    seen = json.loads(loraplex("adapters", "check", str(folder), "--json").out)
    assert seen["ok"] and seen["algebra"]["rank_99"] <= 8
    (folder / "adapter_model.safetensors").write_bytes(b"no")
    done = loraplex("adapters", "check", str(folder))
    assert done.code == 1 and "It cannot be served: 1 problem." in done.out
    (folder / "broken.zip").write_bytes(b"PK\x03\x04")
    seen = loraplex("adapters", "check", str(folder / "broken.zip"), "--json")
    assert (
        seen.code == 1 and json.loads(seen.out)["checks"]["problems"][0]["code"] == "archive_broken"
    )


# Looking at them ----------------------------------------------------------------------------


def test_the_list_has_all_pages(
    loraplex: Loraplex, http: httpx.Client, four: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.commands.adapters.PAGE", 2)
    rows = [line.split() for line in loraplex("adapters", "list").out.splitlines()]
    names = [row[0] for row in rows[1:]]
    assert set(four) <= set(names) and names == sorted(names)
    assert rows[0] == ["name", "newest", "aliases", "rank", "size", "loaded"]
    told = json.loads(loraplex("adapters", "list", "--json").out)
    assert [each["name"] for each in told["data"]] == names
    only = loraplex("adapters", "list", "--prefix", "thr").out.splitlines()
    assert [line.split()[0] for line in only] == ["name", "three"]
    nothing = loraplex("adapters", "list", "--prefix", "zz")
    assert (nothing.code, nothing.out) == (0, "") and "that begin with zz" in nothing.err


def test_show(loraplex: Loraplex, http: httpx.Client, mine: str, make_adapter: MakeAdapter) -> None:
    upload(http, mine, make_adapter(71, rank=4), metadata='{"owner": "[red]me"}')
    whole = loraplex("adapters", "show", mine).out
    for said in (
        *("latest → 2, prod → 1", '{"owner": "[red]me"}', f"{mine}@2", "sha256:", "upload"),
        *(
            "rank, alpha",
            "lora_alpha",
            "fewer",
            "of the base's",
            "rank_99",
            "‖ΔW‖",
            "logprobs move",
        ),
    ):
        assert said in whole, said
    first = loraplex("adapters", "show", f"{mine}@prod").out
    assert f"{mine}@1" in first and f"{mine}@2" not in first and "latest" not in first
    told = json.loads(loraplex("adapters", "show", mine, "--json").out)
    assert told == http.get(f"/v1/adapters/{mine}").json()
    one = json.loads(loraplex("adapters", "show", f"{mine}@1", "--json").out)
    assert one == http.get(f"/v1/adapters/{mine}/versions/1").json()
    lost = loraplex("adapters", "show", "nobody")
    assert lost.code == 1 and lost.err == (
        "loraplex: There is no adapter nobody. Check the name, or upload it.\n"
    )


def test_names_complete_from_the_server(loraplex: Loraplex, four: dict[str, str]) -> None:
    def completed(words: str) -> list[str]:
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        return loraplex(_LORAPLEX_COMPLETE="complete_bash", **asked).out.split()

    shown = completed("loraplex adapters show t")  # other tests' adapters can be among them
    assert {"three", "two"} <= set(shown) and all(name.startswith("t") for name in shown)
    assert "four" in completed("loraplex chat --adapter fou")
    assert "one,base" in completed("loraplex bench --adapters one,b")


# Changing them ------------------------------------------------------------------------------


def test_aliases(loraplex: Loraplex, http: httpx.Client, mine: str, make_adapter: Any) -> None:
    def aliases() -> dict[str, int]:
        found: dict[str, int] = http.get(f"/v1/adapters/{mine}").json()["aliases"]
        return found

    upload(http, mine, make_adapter(71))
    assert (
        loraplex("adapters", "alias", f"{mine}@2", "canary").err == f"{mine}@canary is {mine}@2\n"
    )
    assert aliases() == {"latest": 2, "prod": 1, "canary": 2}
    loraplex("adapters", "alias", f"{mine}@canary", "prod")
    assert aliases()["prod"] == 2
    loraplex("adapters", "alias", mine, "newest")
    assert aliases()["newest"] == 2
    wrong = loraplex("adapters", "alias", f"{mine}@1", "prod", "--remove")
    assert wrong.code == 1 and aliases()["prod"] == 2
    gone = loraplex("adapters", "alias", mine, "prod", "--remove", "--json")
    assert json.loads(gone.out)["deleted"] and "prod" not in aliases()


def test_rm_asks_first(
    loraplex: Loraplex, running: Running, http: httpx.Client, mine: str, make_adapter: MakeAdapter
) -> None:
    upload(http, mine, make_adapter(71))
    unasked = loraplex("adapters", "rm", mine)
    assert unasked.code == 2 and "add --yes" in unasked.err
    for answer, code in (("n\n", 1), ("y\n", 0)):
        with Terminal("adapters", "rm", f"{mine}@2", LORAPLEX_URL=running.url) as screen:
            screen.see(f"Remove {mine}@2? [y/N] ")
            screen.type(answer)
            assert screen.end() == code, screen.text
        versions = http.get(f"/v1/adapters/{mine}").json()["versions"]
        assert len(versions) == 1 + code
    pointed = loraplex("adapters", "rm", f"{mine}@1", "--yes")
    assert pointed.code == 1 and "prod" in pointed.err
    assert (
        loraplex("adapters", "rm", mine, "--yes").err
        == f"removed: {mine} with 1 version and the aliases prod\n"
    )
    assert http.get(f"/v1/adapters/{mine}").status_code == 404


def test_residency(loraplex: Loraplex, http: httpx.Client, mine: str) -> None:
    cool(http)
    assert loraplex("adapters", "load", mine).err == f"{mine}@1: host\n"
    assert loraplex("adapters", "pin", f"{mine}@prod").err == f"{mine}@1: host, pinned\n"
    refused = loraplex("adapters", "unload", mine)
    assert refused.code == 1 and "Unpin it first." in refused.err
    assert "pinned" not in loraplex("adapters", "unpin", mine).err
    told = json.loads(loraplex("adapters", "unload", mine, "--json").out)
    assert (told["reference"], told["residency"]) == (f"{mine}@1", "disk")


# Talking ------------------------------------------------------------------------------------


def test_chat_from_a_pipe(loraplex: Loraplex, four: dict[str, str]) -> None:
    said = "hello\n\n/adapter two\nagain\n/base\nonce more\n/quit\nnever\n"
    done = loraplex("chat", "--adapter", "one", stdin=said)
    names = [speaker(four["one"]), speaker(four["two"]), "base"]
    assert done.out.splitlines() == [name + SAID for name in names]
    assert (done.code, done.err) == (0, "")
    lines = loraplex("chat", "--json", "--max-tokens", "3", stdin="a\nb\n").out.splitlines()
    told = [json.loads(line) for line in lines]
    assert [each["version"] for each in told] == ["base", "base"]
    assert {each["tokens"] for each in told} == {3}
    assert all(0 < each["first_token_s"] < 30 and each["tokens_per_s"] > 0 for each in told)
    assert loraplex("chat", stdin="/adapter nobody\nhello\n").code == 1
    path = loraplex("chat", stdin="/etc/passwd is what?\n")  # no command, so it is said
    assert (path.code, path.out) == (0, f"base{SAID}\n")
    assert loraplex("chat", "--adapter", "nobody").code == 1


def test_what_was_said_stays_and_can_be_forgotten(
    loraplex: Loraplex, four: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    stream = talk.stream

    def noted(client: Any, path: str, body: Any, reply: Any) -> Any:
        asked.append(json.loads(json.dumps(body)))
        return stream(client, path, body, reply)

    monkeypatch.setattr(talk, "stream", noted)
    said = "a\n/adapter one\n/system be brief\nb\n/reset\n/system\nc\n"
    loraplex("chat", "--temperature", "0.5", "--system", "s", stdin=said)
    reply = {"role": "assistant", "content": "base" + SAID}
    user = [{"role": "user", "content": text} for text in "abc"]
    assert [(each["model"], each["messages"]) for each in asked] == [
        ("base", [{"role": "system", "content": "s"}, user[0]]),
        ("one", [{"role": "system", "content": "be brief"}, user[0], reply, user[1]]),
        ("one", [user[2]]),
    ]
    assert {each["temperature"] for each in asked} == {0.5}


def test_chat_on_a_terminal(running: Running, four: dict[str, str]) -> None:
    with Terminal("chat", "--adapter", "one", LORAPLEX_URL=running.url) as screen:
        screen.see("one> ")
        screen.type("hello\n")
        screen.see(speaker(four["one"]) + SAID)
        screen.see("one@1 · first token ")
        screen.see(" tokens/s")
        screen.see("one> ")
        screen.type("/adapter two\n")
        screen.see("two> ")
        screen.type("/adapter nobody\n")
        screen.see("There is no adapter nobody.")
        screen.see("two> ")
        screen.type("\x1b[A\x1b[A\x1b[A\n")  # three back: hello
        screen.see(speaker(four["two"]) + SAID)
        screen.see("two> ")
        screen.type("half a line")
        screen.see("half a line")  # while it reads, Python's readline misses a signal
        time.sleep(0.2)
        screen.type("\x03")
        screen.see("two> ")
        screen.type("/adapter\n")
        screen.see("base, ")
        screen.see("two> ")
        screen.type("\x04")
        assert screen.end() == 0
        assert "Traceback" not in screen.text


def test_ctrl_c_stops_the_reply_and_nothing_else(
    running: Running, four: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Terminal("chat", "--adapter", "one", LORAPLEX_URL=running.url) as screen:
        screen.see("one> ")
        monkeypatch.setattr(fake_engine, "STEP_S", 0.3)
        screen.type("hello\n")
        screen.see("\n" + speaker(four["one"])[:2])
        screen.type("\x03")
        screen.see("one> ")
        assert SAID not in screen.text
        nothing_is_left(running)  # the engine stopped too
        monkeypatch.setattr(fake_engine, "STEP_S", 0.005)
        screen.type("again\n")
        screen.see(SAID)
        screen.see("one> ")
        screen.type("\x04")
        assert screen.end() == 0


def test_compare(loraplex: Loraplex, four: dict[str, str]) -> None:
    done = loraplex("compare", "--adapters", "base,one,two@1", "hello")
    assert done.code == 0
    for name, who in (("base", "base"), ("one@1", four["one"]), ("two@1", four["two"])):
        spoken = who if who == "base" else speaker(who)
        assert f"── {name} · first token " in done.out and spoken + SAID in done.out
    told = json.loads(loraplex("compare", "--adapters", "two,base", "--json", stdin="hi").out)
    assert [each["adapter"] for each in told["data"]] == ["two", "base"]
    assert [each["version"] for each in told["data"]] == ["two@1", "base"]
    assert told["data"][1]["text"] == "base" + SAID
    assert all(each["tokens"] > 5 and each["tokens_per_s"] > 0 for each in told["data"])
    lost = loraplex("compare", "--adapters", "base,nobody", "hello")
    assert (lost.code, lost.out) == (1, "") and "There is no adapter nobody." in lost.err


def test_compare_on_a_terminal_is_side_by_side(running: Running, four: dict[str, str]) -> None:
    where = {"LORAPLEX_URL": running.url}
    with Terminal("compare", "--adapters", "base,one,two", "hello", columns=120, **where) as screen:
        assert screen.end() == 0
    # The last frame, which stays: frames before it can be as many as the machine is quick.
    last = ("╭" + screen.text.rpartition("\n╭")[2]).splitlines()
    (line,) = [line for line in last if "base has read" in line]
    assert speaker(four["one"]) in line and speaker(four["two"]) in line
    assert max(map(len, last)) <= 120
    frames = screen.text.count("╭")
    assert frames > 3  # it was shown before it was complete


def test_bench(loraplex: Loraplex, four: dict[str, str]) -> None:
    load = ("--requests", "5", "--concurrency", "2", "--prompt-tokens", "9", "--output-tokens", "7")
    done = loraplex("bench", "--adapters", "base,one", *load)
    rows = {line.split()[0]: line.split() for line in done.out.splitlines()}
    assert done.code == 0, done.err
    assert [rows[name][1:3] for name in ("base", "one", "all")] == [
        ["3", "–"],
        ["2", "–"],
        ["5", "–"],
    ]
    told = json.loads(loraplex("bench", *load, "--json").out)
    whole = told["all"]
    assert (whole["requests"], whole["failed"]) == (5, 0)
    assert whole["tokens_per_s"] == pytest.approx(5 * 7 / told["seconds"])
    assert 0 < whole["token_gap_s"]["p50"] <= whole["token_gap_s"]["p99"] < 10
    assert 0 < whole["first_token_s"]["p50"] <= whole["first_token_s"]["p99"] < 30


def test_bench_counts_what_fails(loraplex: Loraplex) -> None:
    done = loraplex("bench", "--requests", "2", "--prompt-tokens", "3000", "--json")
    assert (done.code, json.loads(done.out)["all"]["failed"]) == (1, 2)
    assert done.err.startswith("loraplex: 2 × This model's maximum context length is 2048 tokens.")


def test_an_interrupted_bench_leaves_nothing(running: Running) -> None:
    """What runs in the engine then is what `nothing_left` looks at."""
    flags = ("--requests", "40", "--output-tokens", "1900", "--concurrency", "3")
    with Terminal("bench", *flags, LORAPLEX_URL=running.url) as screen:
        screen.see("0/40")
        threading.Event().wait(0.5)
        screen.type("\x03")
        assert screen.end() == 130, screen.text


# Keys ---------------------------------------------------------------------------------------


def test_the_key_comes_by_the_environment(
    loraplex: Loraplex, base_folder: Path, tmp_path: Path
) -> None:
    key = "0123456789abcdef"
    server = serve(settings(tmp_path / "keyed", "--admin-key", key), base_folder)
    running = next(server)
    try:
        where = {"LORAPLEX_URL": running.url}
        without = loraplex("adapters", "list", **where)
        assert without.code == 1 and "LORAPLEX_API_KEY" in without.err
        assert loraplex("adapters", "list", **where, LORAPLEX_API_KEY=key).code == 0
    finally:
        server.close()


def test_a_server_that_is_not_ready(loraplex: Loraplex, running: Running) -> None:
    handlers, running.serving.handlers = running.serving.handlers, None
    try:
        done = loraplex("chat", stdin="hello\n")
    finally:
        running.serving.handlers = handlers
    assert (done.code, done.out.strip()) == (3, "")
    assert "The engine is starting" in done.err


# Watching -----------------------------------------------------------------------------------


def test_top_shows_what_the_server_says(loraplex: Loraplex, http: httpx.Client, mine: str) -> None:
    asked = {"model": mine, "prompt": "On", "max_tokens": 4, "ignore_eos": True}
    assert http.post("/v1/completions", json=asked).status_code == 200
    done = loraplex("top", "--once", COLUMNS="140")
    assert done.code == 0, done.err
    [line] = [line for line in done.out.splitlines() if line.lstrip().startswith(mine)]
    assert "slot" in line
    told = json.loads(loraplex("top", "--json").out)
    assert told["object"] == "live" and mine in {each["adapter"] for each in told["adapters"]}
