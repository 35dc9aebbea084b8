"""The command line against the real server: what people see of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from adapters.demo import WEIGHTS
from tests.conftest import MakeAdapter
from tests.real.conftest import Server
from tests.terminal import Terminal

TABLE = (
    "Write one SQLite query that answers the question. Reply with the query only.\n\n"
    "CREATE TABLE readers (id INTEGER, name TEXT, city TEXT, loans INTEGER)\n\n"
    "Question: How many readers live in Oslo?"
)


def loraplex(server: Server, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("loraplex"), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"LORAPLEX_URL": server.url, "COLUMNS": "120"},
    )


def test_an_adapter_comes_in_answers_and_goes(server: Server, make_adapter: MakeAdapter) -> None:
    done = loraplex(server, "adapters", "add", str(make_adapter(77)), "--name", "by-command")
    assert (done.returncode, done.stdout) == (0, "by-command@1\n"), done.stderr
    shown = loraplex(server, "adapters", "show", "by-command").stdout
    assert "logprobs move by up to" in shown and "fewer" in shown
    again = loraplex(server, "adapters", "add", str(WEIGHTS / "sql"), "--name", "by-command")
    assert again.stdout == "by-command@2\n"
    assert loraplex(server, "adapters", "alias", "by-command@2", "prod").returncode == 0
    pinned = loraplex(server, "adapters", "pin", "by-command@prod", "--json")
    assert json.loads(pinned.stdout)["pinned"]
    reply = loraplex(
        server, "chat", "--adapter", "by-command@prod", "--temperature", "0", stdin="hi"
    )
    assert reply.returncode == 0 and reply.stdout.strip()
    assert loraplex(server, "adapters", "unpin", "by-command@2").returncode == 0
    assert loraplex(server, "adapters", "rm", "by-command", "--yes").returncode == 0
    assert loraplex(server, "adapters", "show", "by-command").returncode == 1


def test_a_conversation_changes_who_answers(server: Server) -> None:
    flags = ("--adapter", "sql", "--temperature", "0", "--max-tokens", "40")
    with Terminal("chat", *flags, LORAPLEX_URL=server.url) as screen:
        screen.see("sql> ")
        screen.type(TABLE.replace("\n", "\\\n") + "\n")
        said = screen.see("sql@1 · first token ")
        assert "SELECT COUNT(*) FROM readers" in said
        screen.see("tokens/s")
        screen.see("sql> ")
        screen.type("/adapter poetry\n")
        screen.see("poetry> ")
        screen.type("Write a poem about the river.\n")
        screen.see("poetry@1 · first token ")
        screen.see("poetry> ")
        screen.type("\x04")
        assert screen.end() == 0


def test_all_are_compared_at_once(server: Server) -> None:
    flags = ("--adapters", "base,sql,poetry", "--max-tokens", "24", "--json")
    done = loraplex(server, "compare", *flags, TABLE)
    told = {each["adapter"]: each for each in json.loads(done.stdout)["data"]}
    assert [each["version"] for each in told.values()] == ["base", "sql@1", "poetry@1"]
    assert "SELECT COUNT(*) FROM readers" in told["sql"]["text"]
    assert len({each["text"] for each in told.values()}) == 3
    assert all(each["tokens"] > 1 and each["first_token_s"] > 0 for each in told.values())


def test_a_small_bench(server: Server) -> None:
    load = (
        "--requests",
        "4",
        "--concurrency",
        "2",
        "--prompt-tokens",
        "16",
        "--output-tokens",
        "8",
    )
    done = loraplex(server, "bench", "--adapters", "base,sql", *load, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert (told["all"]["requests"], told["all"]["failed"]) == (4, 0)
    assert round(told["all"]["tokens_per_s"] * told["seconds"]) == 4 * 8
