"""Commands without a server: what they load, what they need, what they say, and how they end."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from adapters.demo import WEIGHTS
from server import cli
from server.commands.bench import percentile
from server.commands.terminal import bytes_text, printable
from server.commands.upload import name_of
from server.keys import SCOPES
from tests import live_server
from tests.conftest import MakeAdapter
from tests.terminal import Terminal

NOWHERE = "http://127.0.0.1:1"


def loraplex(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "120"} | environment,
        stdin=subprocess.DEVNULL,
    )


def test_most_commands_load_little() -> None:
    """Whoever types `adapters list`, or Tab, waits for what is imported."""
    code = "import sys; from server import cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {"torch", "transformers", "vllm", "numpy", "sqlalchemy", "pydantic", "fastapi"}
    assert slow & set(done.stdout.split()) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["adapters", "list"],
        ["adapters", "show", "sql"],
        ["adapters", "add", str(WEIGHTS / "sql")],
        ["adapters", "pin", "sql"],
        ["chat"],
        ["compare", "hello"],
        ["top"],
        ["bench"],
    ],
)
def test_no_server(arguments: list[str]) -> None:
    done = loraplex(*arguments, "--url", NOWHERE)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.strip() == (
        f"loraplex: no server answers at {NOWHERE}: start one with `loraplex serve`, or name "
        "another with --url or LORAPLEX_URL"
    )


def test_the_environment_names_the_server() -> None:
    assert NOWHERE in loraplex("adapters", "list", LORAPLEX_URL=NOWHERE).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["adapters", "list", "--url", "localhost:8000"], "is no address of a server"),
        (["adapters", "add", "/nowhere"], "There is no folder or archive /nowhere."),
        (["adapters", "add", "."], "Give it one with --name."),
        (["adapters", "add", "x", "--name", "x", "--metadata", "[1]"], "a JSON object"),
        (["compare", "--adapters", ",", "hello"], "Name at least one"),
        (["adapters", "lost"], "No such command"),
        (["bench", "--requests", "0"], "--requests"),
        (["adapters", "add", str(WEIGHTS / "sql" / "adapter_config.json")], "the folder that it"),
        (["adapters", "add", str(WEIGHTS / "sql"), "--name", "Bad Name"], "Bad Name"),
        (["adapters", "show", "UPPER"], "UPPER"),
        (["adapters", "check", ".", "--url", NOWHERE, "--max-lora-rank", "8"], "leave out"),
        (["adapters", "check", ".", "--home", "/nowhere"], "There is no folder /nowhere."),
        (["adapters", "check", str(WEIGHTS / "sql"), "--max-lora-rank", "7"], "it can be 1, 8"),
        (["usage", "--since-hours", "nan"], "--since-hours"),
        (["usage", "--since-hours", "-5"], "--since-hours"),
        (["keys", "create", "x", "--scope", "infer", "--expires-days", "nan"], "--expires-days"),
        (["keys", "create", "x", "--scope", "bogus", "--home", "."], "bogus"),
        (["keys", "list", "--home", "/nowhere"], "is no state folder"),
        (["keys", "revoke", "x", "--home", "/nowhere"], "is no state folder"),
        (["serve", "other/base"], "--model other/base"),
        (["serve", "--served-model-name", "A", "B"], "B belongs to no flag"),
        (["serve", "--port", "abc"], "port"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], said: str) -> None:
    folder = tmp_path / "My Adapter"
    folder.mkdir()
    at = [str(folder) if each == "." else each for each in arguments]
    done = loraplex(*at, COLUMNS="300")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in folder.iterdir()} <= {"registry.db"}  # nothing was prepared


def test_a_key_that_is_none_is_not_printed() -> None:
    for key in ("lpx_a secret", "lpx_süß", "lpx_\u201csecret\u201d", "lpx_x\nsecret"):
        done = loraplex("adapters", "list", LORAPLEX_API_KEY=key)
        assert (done.returncode, done.stdout) == (2, "")
        assert "LORAPLEX_API_KEY" in done.stderr and "secret" not in done.stderr
    done = loraplex("adapters", "list", "--url", NOWHERE, LORAPLEX_API_KEY="lpx_from_a_file\r\n")
    assert done.returncode == 3


def test_errors_are_json_too() -> None:
    done = loraplex("adapters", "list", "--json", "--url", NOWHERE)
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["message"] in done.stderr


@pytest.mark.parametrize("url", ["http://nohost.invalid", "http://127.0.0.1:99999"])
def test_why_no_server_answers(url: str) -> None:
    done = loraplex("adapters", "list", "--url", url)
    assert done.returncode in (2, 3)
    assert "Traceback" not in done.stderr and "start one" not in done.stderr


def test_a_page_of_something_else_is_no_answer() -> None:
    with live_server.serve(page="<html>") as server:
        for command in (["adapters", "list"], ["adapters", "show", "sql"], ["top"], ["chat"]):
            done = loraplex(*command, "--url", server.url)
            assert (done.returncode, done.stdout) == (1, "")
            assert "but not as Loraplex does: is --url right?" in done.stderr


SLOW_IMPORT = """
import sys, time
class Slow:
    def find_spec(self, name, *_):
        if name == "typer":
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
sys.argv = ["loraplex", "adapters", "list"]
from server import cli
"""


def test_a_command_that_is_interrupted_while_it_imports_says_nothing() -> None:
    command = [sys.executable, "-c", SLOW_IMPORT]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "importing\n"
        running.send_signal(signal.SIGINT)
        assert running.communicate()[1] == ""
    assert running.returncode == -signal.SIGINT


def test_a_table_in_a_pipe_is_not_cut(tmp_path: Path) -> None:
    name = "somebody-with-a-long-name " * 4
    scopes = [word for scope in SCOPES for word in ("--scope", scope)]
    made = loraplex("keys", "create", name, *scopes, "--home", str(tmp_path), COLUMNS="80")
    assert f"it is for the server on {tmp_path}, which now wants a key of everybody" in made.stderr
    row = loraplex("keys", "list", "--home", str(tmp_path), COLUMNS="80").stdout.splitlines()[1]
    assert name.strip() in row and " ".join(SCOPES) in row


def test_the_version() -> None:
    assert loraplex("--version").stdout.strip() == version("loraplex")
    assert loraplex("adapters", "-h").returncode == 0


def test_something_else_answers_there() -> None:
    with live_server.serve() as server:
        done = loraplex("adapters", "list", "--url", server.url)
    assert done.returncode == 1
    assert "HTTP status 404, but not as Loraplex does: is --url right?" in done.stderr


def _commands(group: Any, *path: str) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from _commands(command, *path, name)


@pytest.mark.parametrize("command", [*_commands(typer.main.get_command(cli.cli))], ids=" ".join)
def test_help(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == ("serve",):  # it says what it takes itself
        return
    monkeypatch.setattr(sys, "argv", ["loraplex", *command, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert f"loraplex {' '.join(command)}".strip() in said
    if command and command != ("keys",) and command != ("adapters",):
        assert "--json" in said  # whatever has output has it for programs


def test_the_codes_are_documented() -> None:
    said = " ".join(loraplex("--help").stdout.split())
    for code in ("0 all is well", "1 refused", "2 wrong usage", "3 the server cannot be reached"):
        assert code in said
    assert "130 interrupted" in said
    assert {"LORAPLEX_URL", "LORAPLEX_API_KEY"} <= set(said.replace(",", "").split())


def test_the_scopes_are_documented() -> None:
    said = loraplex("keys", "create", "--help", COLUMNS="200").stdout
    assert all(scope in said for scope in SCOPES)


def test_keys_as_json(tmp_path: Path) -> None:
    home = ("--home", str(tmp_path / "home"), "--json")
    made = json.loads(loraplex("keys", "create", "ci", "--scope", "infer", *home).stdout)
    assert made["key"].startswith(f"lpx_{made['id']}_") and made["scopes"] == ["infer"]
    (listed,) = json.loads(loraplex("keys", "list", *home).stdout)["data"]
    assert listed == {name: value for name, value in made.items() if name != "key"}
    other = json.loads(loraplex("keys", "rotate", made["id"], *home).stdout)
    assert other["key"] != made["key"] and other["id"] == made["id"]
    assert json.loads(loraplex("keys", "revoke", made["id"], *home).stdout)["revoked"]
    assert json.loads(loraplex("usage", *home).stdout) == {"object": "list", "data": []}


# Check, without a server --------------------------------------------------------------------


Check = Callable[..., SimpleNamespace]


@pytest.fixture
def check(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """`loraplex adapters check …`, in this process, which has torch already."""

    def run(*arguments: str) -> SimpleNamespace:
        command = ["loraplex", "adapters", "check", *arguments, "--home", str(home)]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code, out=said.out, err=said.err)

    return run


def test_a_sound_adapter_is_checked_without_a_server(check: Check, home: Path) -> None:
    done = check(str(WEIGHTS / "sql"))
    assert done.code == 0, done.err
    for said in ("2,442,240", "97.70% fewer", "1.84% of the base's", "of 8 directions", "‖ΔW‖ ="):
        assert said in done.out
    assert "It can be served." in done.out
    assert sorted(path.name for path in home.iterdir()) == ["base"]  # nothing is stored


def test_every_problem_is_said_with_what_to_do(
    check: Check, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = shutil.copytree(make_adapter(1), tmp_path / "bad")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    done = check(str(folder), "--max-lora-rank", "1")
    assert done.code == 1
    for said in (
        "dora  use_dora",
        "→ Train it with use_dora=False.",
        "rank_above_max",
        "2 problems",
    ):
        assert said in done.out
    seen = json.loads(check(str(folder), "--max-lora-rank", "1", "--json").out)
    assert not seen["ok"]
    assert [each["code"] for each in seen["checks"]["problems"]] == ["dora", "rank_above_max"]


def test_files_that_are_links_are_checked_too(
    check: Check, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """As in the cache of the hub's library."""
    for file in make_adapter(1).iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert check(str(tmp_path)).code == 0


def test_an_archive_and_what_is_none(check: Check, tmp_path: Path) -> None:
    packed = shutil.make_archive(str(tmp_path / "sql"), "gztar", WEIGHTS / "sql")
    assert check(packed).code == 0
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"PK\x03\x04 no more")
    done = check(str(broken))
    assert done.code == 1 and "archive_broken" in done.out and "1 problem." in done.out


def test_a_folder_without_an_adapter_needs_no_base(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = check(str(tmp_path), "--model", "/nowhere")
    assert done.code == 1 and "config_missing" in done.out and "weights_missing" in done.out
    done = check(str(WEIGHTS / "sql"), "--model", "/nowhere")
    assert done.code == 1 and "--model /nowhere: no such folder" in done.err


# Top ----------------------------------------------------------------------------------------


def test_top_once() -> None:
    with live_server.serve() as server:
        done = loraplex("top", "--once", "--url", server.url)
        assert json.loads(loraplex("top", "--json", "--url", server.url).stdout) == server.said
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert rows["sql"][1:] == [
        "slot",
        "3",
        "2",
        "1,234",
        "–",
        "31.2",
        "0.21/0.40",
        "31/50",
        "▁▂▃▄▅▆▇█",
    ]
    assert rows["code"][1:6] == ["host", "–", "–", "1", "2"]
    for said in ("up 2 h 5 min", "1 restart of the engine", "slots 1/8", "host cache 2/32"):
        assert said in done.stdout
    assert "load failed  broken@1" in done.stdout
    assert "loaded in 0.12 s  sql@1, database@4" in done.stdout


@pytest.mark.parametrize(("key", "code"), [("q", 0), ("\x03", 130)])
def test_top_looks_each_second_until_it_is_told_to_end(key: str, code: int) -> None:
    with live_server.serve() as server, Terminal("top", LORAPLEX_URL=server.url) as screen:
        screen.see("sql")
        asked, began = server.asked, time.monotonic()
        server.said = live_server.live(adapters=[live_server.adapter("newcomer")])
        screen.see("newcomer")
        assert server.asked > asked and time.monotonic() - began < 10
        before = screen.modes
        screen.type(key)
        assert screen.end() == code
        assert before == [0, 0] and 0 not in screen.modes
        assert screen.raw.rindex("\x1b[?1049l") > screen.raw.rindex("\x1b[?1049h")  # as it was


def test_top_waits_for_a_server_that_is_away() -> None:
    with live_server.serve() as server:
        screen = Terminal("top", LORAPLEX_URL=server.url)
        with screen:
            screen.see("sql")
            server.shutdown()
            server.socket.close()
            screen.see("no server answers")
            screen.type("q")
            assert screen.end() == 0


def test_what_others_wrote_cannot_steer_the_terminal() -> None:
    said = printable("a\x1b[2Jb\r\x07\n\tc\x9b1mé 👩‍👩‍👧")
    assert said == "a�[2Jb��\n\tc�1mé 👩‍👩‍👧"


# Small things -------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    script = loraplex(_LORAPLEX_COMPLETE=f"source_{shell}")
    asked = {"bash": {"COMP_WORDS": "loraplex adap", "COMP_CWORD": "1"}}.get(
        shell, {"_TYPER_COMPLETE_ARGS": "loraplex adap", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    )
    done = loraplex(_LORAPLEX_COMPLETE=f"complete_{shell}", **asked)
    assert "_LORAPLEX_COMPLETE" in script.stdout
    assert "adapters" in done.stdout


def test_names_complete_to_nothing_without_a_server() -> None:
    began = time.monotonic()
    asked = {"COMP_WORDS": "loraplex adapters show s", "COMP_CWORD": "3"}
    done = loraplex(_LORAPLEX_COMPLETE="complete_bash", LORAPLEX_URL=NOWHERE, **asked)
    assert (done.stdout.strip(), done.stderr) == ("", "")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/somewhere/sql", "sql"),
        ("out/sql-2.0.tar.gz", "sql-2.0"),
        ("sql.zip", "sql"),
        ("sql.tar.zst", "sql"),
        ("hf://org/sql@main", "sql"),
        ("s3://bucket/a/sql", "sql"),
        ("hf://org/repo/folder", "folder"),
    ],
)
def test_names(source: str, name: str) -> None:
    assert name_of(source) == name


def test_bytes() -> None:
    counts = (0, 999, 1000, 4_939_072, 99_400_000, 268_700_000, 1_500_000_000, 2e12)
    words = ("0 B", "999 B", "1 kB", "4.94 MB", "99.4 MB", "269 MB", "1.5 GB", "2,000 GB")
    assert tuple(map(bytes_text, counts)) == words


def test_percentiles() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0], 99) == 3.0
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99)) == (50.0, 99.0)
