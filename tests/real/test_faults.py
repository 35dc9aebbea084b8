"""Faults while others stream: who hits one is told what is wrong, and nobody else notices.

Of disk and files first, of the engine's processes last: of these each costs another start.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.folder import FILES, WEIGHTS
from adapters.store import Store
from tests.conftest import MakeAdapter, with_base
from tests.http.conftest import cool, upload
from tests.processes import descendants
from tests.real.conftest import START_S, Server, nothing_left
from tests.real.test_lifecycle import bent, refused, scaled

pytestmark = pytest.mark.timeout(2 * START_S)  # a start, and what is done with it

LOAD_S = 12  # that a load may take
SILENCE_S = 15  # that the engine may be silent
SLOW_S = 6.0
STREAMS, TOKENS = 4, 30
SLOW_DISK = Path(__file__).with_name("slow_disk")
DISK_MB = 256
ASKED = {"prompt": "The sea", "max_tokens": 8, "temperature": 0}
OTHERS = ("one", "two", "three")  # as many as the host cache holds
WILD = 6  # uploads: half of them would be noticed if their NaN stayed in memory
FLAGS = ("--no-demo-adapters", "--max-loras", "2", "--max-cpu-loras", "3", "--max-lora-rank", "8")
TIMES = ("--load-timeout", str(LOAD_S), "--engine-timeout", str(SILENCE_S))
# A superuser whom file modes bind as they do anybody else.
BOUND = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")


class Stream:
    """A streamed completion in a thread: what has come of it so far."""

    def __init__(self, url: str, model: str, most: int) -> None:
        self.reply: httpx.Response | None = None
        self.events: list[dict[str, Any]] = []
        self.done = False
        self.gap = 0.0
        self.took = 0.0
        self._asked = {"model": model, "prompt": "On", "max_tokens": most, "ignore_eos": True}
        self._asked |= {"temperature": 0, "stream": True, "return_token_ids": True}
        self._thread = threading.Thread(target=self._run, args=(f"{url}/v1/completions",))
        self._thread.start()

    def _run(self, url: str) -> None:
        began = last = time.monotonic()
        with httpx.stream("POST", url, json=self._asked, timeout=120) as self.reply:
            if self.reply.status_code != 200:
                self.reply.read()
            for line in self.reply.iter_lines() if self.reply.status_code == 200 else ():
                if self.tokens:
                    self.gap = max(self.gap, time.monotonic() - last)
                last = time.monotonic()
                self.done = line == "data: [DONE]" or self.done
                if line.startswith("data: {"):
                    self.events.append(json.loads(line[6:]))
        self.took = time.monotonic() - began

    @property
    def tokens(self) -> int:
        """How many there are; two can share an event."""
        choices = [choice for event in self.events for choice in event.get("choices", ())]
        return sum(len(choice.get("token_ids") or ()) for choice in choices)

    def has_begun(self) -> None:
        until(lambda: self.tokens > 0 or not self._thread.is_alive(), 60)
        assert self.tokens, self

    def join(self) -> None:
        self._thread.join(120)
        assert not self._thread.is_alive()

    def is_whole(self) -> bool:
        """Every token came, and the end that belongs to them."""
        whole = self.tokens == self._asked["max_tokens"]
        return self.done and whole and _ends(self.events) == ["length"]

    def ended_with(self, code: str) -> bool:
        """The last event is an error with this code, and no choice had an end of its own."""
        *before, last = self.events
        return last.get("error", {}).get("code") == code and not _ends(before)

    def __repr__(self) -> str:
        return f"{self._asked['model']}: {self.reply}, {self.tokens} tokens, {self.events[-1:]}"


def _ends(events: list[dict[str, Any]]) -> list[str]:
    choices = [choice for event in events for choice in event.get("choices", ())]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


class Streams:
    """Inside, four streams of the base run, one after the other each; all of them end well."""

    def __init__(self, url: str) -> None:
        self.gap = 0.0  # the longest between two tokens
        self._url = url
        self._ended: list[Stream] = []
        self._stop = threading.Event()

    def __enter__(self) -> "Streams":
        first = [Stream(self._url, "base", TOKENS) for _ in range(STREAMS)]
        self._threads = [threading.Thread(target=self._run, args=(each,)) for each in first]
        for thread in self._threads:
            thread.start()
        for stream in first:
            stream.has_begun()
        return self

    def _run(self, stream: Stream) -> None:
        while True:
            stream.join()
            self._ended.append(stream)
            if self._stop.is_set():
                return
            stream = Stream(self._url, "base", TOKENS)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if kind is None:
            assert len(self._ended) >= STREAMS
            for stream in self._ended:
                assert stream.is_whole(), stream
            self.gap = max(stream.gap for stream in self._ended)


class Bound(Server):
    """A server that may read what file modes allow, even as root."""

    def __init__(self, home: Path, *flags: str, **environment: str) -> None:
        super().__init__(home, *flags, **environment)
        if os.geteuid() == 0 and shutil.which(BOUND[0]):
            self._command = [*BOUND, *self._command]


@dataclass
class Site:
    """The server under test, its disk, and adapters for it."""

    server: Server
    client: httpx.Client
    slow: Path
    folder: Path
    scratch: Path
    disk: Path | None
    made: int = 0

    def adapter(self) -> Path:
        """A folder with an adapter like no other."""
        self.made += 1

        def turn(name: str, values: torch.Tensor) -> torch.Tensor:
            return values.roll(self.made, 0) if "lora_B" in name else values

        return bent(self.folder, self.scratch / str(self.made), turn)

    def ask(self, model: str, **more: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json=ASKED | {"model": model} | more)

    def said(self, model: str) -> str:
        reply = self.ask(model)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])

    def streams(self) -> Streams:
        return Streams(self.server.url)

    def version(self, name: str) -> dict[str, Any]:
        (version,) = self.client.get(f"/v1/adapters/{name}").json()["versions"]
        return version

    def cold(self, name: str) -> "Victim":
        """A new adapter that is not in the engine any more."""
        folder = self.adapter()
        reply = upload(self.client, name, folder)
        assert reply.status_code == 201, reply.text
        victim = Victim(self, name, reply.json()["digest"], folder, self.said(name))
        assert victim.text != self.said("base"), "it would not be missed"
        victim.leave()
        return victim

    def slowly(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """Inside, reading an adapter takes so long."""

        @contextlib.contextmanager
        def slow() -> Iterator[None]:
            self.slow.write_text(str(seconds))
            try:
                yield
            finally:
                self.slow.unlink()

        return slow()

    def process(self, kind: str) -> int:
        assert self.server.process is not None
        named = f"VLLM::{kind}".encode()
        (pid,) = (
            pid
            for pid in descendants(self.server.process.pid)
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(named)
        )
        return pid

    def restarts(self) -> float:
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith("loraplex_engine_restarts_total "):
                return float(line.split()[1])
        raise AssertionError("no such series")


@dataclass
class Victim:
    """An adapter to be harmed."""

    site: Site
    name: str
    digest: str
    folder: Path
    text: str

    @property
    def place(self) -> Path:
        digits = self.digest.removeprefix("sha256:")
        return self.site.server.home / "store" / "sealed" / digits[:2] / digits

    @property
    def form(self) -> Path:
        (form,) = self.place.glob("engine-*")
        return form

    def becomes(self, other: "Victim", copy: Callable[[Path, Path], Any]) -> None:
        for to, source in ((self.place, other.place), (self.form, other.form)):
            for name in FILES:
                writable(lambda file, source=source: copy(source / file.name, file))(to / name)

    def leave(self) -> None:
        """Whoever asks for it next has it read from disk."""
        reply = self.site.client.post(f"/v1/adapters/{self.name}/unload")
        assert reply.json()["residency"] == "disk", reply.text

    def serves(self) -> None:
        """With nobody beside it, so that it says the same to the bit."""
        assert self.site.said(self.name) == self.text

    def is_quarantined(self, why: str) -> None:
        reply = self.site.ask(self.name)
        fails(reply, 409, "version_quarantined", why, "Upload the same files again")
        shown = self.site.version(self.name)
        assert shown["state"] == "quarantined" and why in shown["reason"]

    def is_mended(self) -> None:
        again = upload(self.site.client, self.name, self.folder)
        assert (again.status_code, again.json()["state"]) == (200, "ready"), again.text
        self.serves()


def fails(reply: httpx.Response, status: int, code: str, *words: str) -> None:
    """`reply` is an error in OpenAI's shape that says all of `words`."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert error["code"] == code, error
    for word in words:
        assert word in error["message"], error
    assert ("retry-after" in reply.headers) == (status in (429, 503))


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, base_folder: Path, make_adapter: MakeAdapter
) -> Iterator[Site]:
    scratch = tmp_path_factory.mktemp("faults")
    home, slow = with_base(scratch / "home", base_folder), scratch / "slow"
    path = os.pathsep.join([str(SLOW_DISK), *filter(None, [os.environ.get("PYTHONPATH")])])
    server = Bound(home, *FLAGS, *TIMES, PYTHONPATH=path, SLOW_DISK=str(slow))
    with small_disk(home / "store") as disk:
        try:
            server.start()
            folder = make_adapter(700, std=0.1, targets=("q_proj", "down_proj"))
            with httpx.Client(base_url=server.url, timeout=120) as client:
                site = Site(server, client, slow, folder, scratch, disk)
                for name in OTHERS:
                    assert upload(client, name, site.adapter()).status_code == 201
                yield site
        finally:
            server.end()


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    """A disk of its own at `place`, or None where one cannot be mounted."""
    place.mkdir()
    options = f"size={DISK_MB}m,mode=0755"
    mounted = shutil.which("mount") and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", options, "loraplex-tests", place], stderr=subprocess.DEVNULL
    )
    try:
        yield place if mounted else None
    finally:
        if mounted:
            subprocess.call(["umount", "--lazy", place])


@pytest.fixture(autouse=True)
def all_is_well_again(site: Site) -> Iterator[None]:
    """After each test, by itself: others and the base are served, and nothing is left behind."""
    yield
    until(lambda: site.client.get("/ready").status_code == 200, START_S)
    for name in ("base", "one"):
        site.said(name)
    nothing_left(site.client)


# Files -------------------------------------------------------------------------------------


def keep_time(harm: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same harm to a file without a trace in its time of modification."""

    def quietly(file: Path) -> None:
        before = file.stat()
        harm(file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    return quietly


def writable(harm: Callable[[Path], None]) -> Callable[[Path], None]:
    @functools.wraps(harm)
    def write(file: Path) -> None:
        file.chmod(0o644)
        harm(file)
        file.chmod(0o444)

    return write


@writable
def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@writable
def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@writable
def spoil(file: Path) -> None:
    """NaN, in a file that is right otherwise."""
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, file, {"format": "pt"})


def test_a_form_that_was_deleted_is_made_again(site: Site) -> None:
    victim = site.cold("formless")
    shutil.rmtree(form := victim.form)
    with site.streams():
        site.said(victim.name)
    assert sorted(file.name for file in form.iterdir()) == sorted([*FILES, "digest"])
    victim.serves()


@pytest.mark.parametrize("harm", [cut, flip, spoil])
def test_a_form_that_was_written_to_is_made_again(site: Site, harm: Callable[[Path], None]) -> None:
    victim = site.cold(f"form-{harm.__name__}")
    harm(victim.form / WEIGHTS)
    with site.streams():
        site.said(victim.name)
    victim.serves()


def test_all_files_deleted(site: Site) -> None:
    victim = site.cold("deleted")
    shutil.rmtree(victim.place)
    with site.streams():
        victim.is_quarantined("Its folder is gone.")
        victim.is_quarantined("Its folder is gone.")
    victim.is_mended()


@pytest.mark.parametrize("harm", [cut, flip, spoil])
def test_files_that_were_written_to(site: Site, harm: Callable[[Path], None]) -> None:
    victim = site.cold(f"file-{harm.__name__}")
    harm(victim.place / WEIGHTS)
    harm(victim.form / WEIGHTS)
    with site.streams():
        victim.is_quarantined("Its files are not what was sealed.")
    victim.is_mended()


def test_files_of_another_adapter_in_its_place(site: Site) -> None:
    victim, other = site.cold("replaced"), site.cold("other")
    victim.becomes(other, shutil.copyfile)
    with site.streams():
        victim.is_quarantined("Its files are not what was sealed.")
    victim.is_mended()


def test_files_of_another_adapter_with_their_times(site: Site) -> None:
    victim, other = site.cold("restored"), site.cold("mixed-up")
    victim.becomes(other, shutil.copy2)
    with site.streams():
        victim.is_quarantined("Its files are not what was sealed.")
    victim.is_mended()


def test_a_form_cut_short_without_a_trace(site: Site) -> None:
    """Nothing is seen before the engine reads it; then it is made again."""
    victim = site.cold("lost-end")
    keep_time(cut)(victim.form / WEIGHTS)
    with site.streams():
        victim.serves()


def test_nan_in_the_engine_is_nobody_elses(site: Site) -> None:
    """It gets there by nothing but a disk that lies; even so, it stays in its own rows."""
    before = site.said("base")
    victim = site.cold("nan-inside")
    keep_time(spoil)(victim.form / WEIGHTS)
    with site.streams():
        assert site.ask(victim.name).status_code in (200, 500)
    assert site.said("base") == before
    victim.leave()
    assert len(Store(site.server.home / "store").damaged_forms(victim.digest)) == 1
    victim.serves()


def test_nan_that_an_upload_computes_is_nobody_elses(site: Site, make_adapter: MakeAdapter) -> None:
    """Not even in the memory that it had: whoever gets that next says what it always says."""

    def all_said() -> list[str]:
        replies = [site.ask("base", prompt="the sea " * n, max_tokens=12) for n in (1, 4, 12, 40)]
        return [reply.json()["choices"][0]["text"] for reply in replies]

    before, tame, answers = all_said(), make_adapter(701), []
    for turn in range(WILD):
        wild = bent(tame, site.scratch / f"wild-{turn}", scaled((turn + 1) * 1e36))
        answers.append(upload(site.client, "wild", wild).text)
        assert all_said() == before, turn
    assert "nonfinite_output" in "".join(answers), answers


def test_an_upload_with_nan_is_refused(site: Site) -> None:
    folder = site.adapter()
    spoil(folder / WEIGHTS)
    with site.streams():
        assert refused(upload(site.client, "nan", folder)) == ["nonfinite"]
    assert site.client.get("/v1/adapters/nan").status_code == 404


@pytest.mark.parametrize("where", ["arriving", "in the form"])
def test_the_disk_is_full(site: Site, where: str) -> None:
    if site.disk is None:
        pytest.skip("a small disk cannot be mounted here")
    folder, name = site.adapter(), f"too-much-{where.replace(' ', '-')}"
    sealed = sorted(site.disk.glob("sealed/*/*"))
    room = sum(file.stat().st_size for file in folder.iterdir())
    left = room // 2 if where == "arriving" else room + room // 4
    with site.streams(), full(site.disk, left):
        reply = upload(site.client, name, folder)
        fails(reply, 507, "no_space", "the disk is full")
        assert site.client.get(f"/v1/adapters/{name}").status_code == 404
        assert not list(site.disk.glob("incoming/*"))
        assert sorted(site.disk.glob("sealed/*/*")) == sealed
    assert upload(site.client, name, folder).status_code == 201


@contextlib.contextmanager
def full(disk: Path, left: int) -> Iterator[None]:
    """Inside, `disk` has no more than so many bytes left."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left)
    try:
        yield
    finally:
        filler.unlink()


def test_files_that_may_not_be_read(site: Site) -> None:
    if os.geteuid() == 0 and not shutil.which(BOUND[0]):
        pytest.skip("file modes do not bind this superuser")
    victim = site.cold("forbidden")
    weights = victim.form / WEIGHTS
    weights.chmod(0)
    with site.streams():
        reply = site.ask(victim.name)
        fails(reply, 503, "adapter_load_failed", victim.digest, "Permission denied")
        weights.chmod(0o444)
        site.said(victim.name)
    victim.serves()


# A slow disk -------------------------------------------------------------------------------


def test_a_slow_disk_holds_up_nobody_else(site: Site) -> None:
    victim = site.cold("slow")
    with site.streams() as streams, site.slowly(SLOW_S):
        began = time.monotonic()
        site.said(victim.name)
        assert time.monotonic() - began > SLOW_S, "the disk was not slow"
    assert streams.gap < SLOW_S, "a step waited for the disk"
    victim.serves()


def test_a_disk_that_hangs_ends_in_a_time_out(site: Site) -> None:
    """As many loads hang as there are threads that read; what is loaded is served meanwhile."""
    victims = [site.cold("hung-1"), site.cold("hung-2")]
    cool(site.client)
    site.said(OTHERS[0])  # loaded, with room for the two beside it
    with site.streams() as streams:
        with site.slowly(600):
            hung = [Stream(site.server.url, each.name, 8) for each in victims]
            time.sleep(1)
            site.said(OTHERS[0])
            for each, victim in zip(hung, victims, strict=True):
                each.join()
                fails(each.reply, 503, "adapter_load_timeout", victim.digest, f"{LOAD_S} s")
                assert LOAD_S < each.took < 2 * LOAD_S
        for victim in victims:
            site.said(victim.name)
    assert streams.gap < LOAD_S, "a step waited for the disk"
    for victim in victims:
        victim.serves()


def test_a_client_that_goes_while_its_adapter_loads(site: Site) -> None:
    victim = site.cold("left-alone")
    with site.streams(), site.slowly(SLOW_S):
        with pytest.raises(httpx.ReadTimeout):
            site.client.post(
                "/v1/completions", json=ASKED | {"model": victim.name}, timeout=SLOW_S / 4
            )
        assert site.version(victim.name)["residency"] == "loading"
    nothing_left(site.client)
    victim.serves()


# The engine's end --------------------------------------------------------------------------


@dataclass
class Death:
    """How an engine ends, and who is in it besides the base and the one to be accused."""

    process: str
    how: signal.Signals
    beside: tuple[str, ...]
    within_s: float  # that those who stream learn of it
    said: str  # to the operator


HANGS = f"has made no step for {SILENCE_S} s"
DEATHS = {
    "worker killed": Death("Worker", signal.SIGKILL, ("one",), SILENCE_S, "the engine has ended"),
    "engine killed": Death("EngineCore", signal.SIGKILL, (), SILENCE_S, "the engine has ended"),
    "worker hangs": Death("Worker", signal.SIGSTOP, ("one",), 2 * SILENCE_S, HANGS),
}


@pytest.fixture(scope="module")
def accused(site: Site) -> Victim:
    return site.cold("accused")


@pytest.fixture(scope="module")
def died() -> list[str]:
    return []


@pytest.mark.parametrize("kind", DEATHS)
def test_the_engine_ends_and_another_takes_its_place(
    site: Site, accused: Victim, died: list[str], kind: str
) -> None:
    death, before, told = DEATHS[kind], site.restarts(), len(site.server.log)
    models = ("base",) * 4 + (accused.name, *death.beside)
    streams = [Stream(site.server.url, model, 1900) for model in models]
    for stream in streams:
        stream.has_begun()
    ended = time.monotonic()
    os.kill(site.process(death.process), death.how)
    died.append(kind)
    for stream in streams:
        stream.join()
        assert stream.ended_with("engine_not_ready"), stream
    assert time.monotonic() - ended < death.within_s
    fails(site.ask("base"), 503, "engine_not_ready", "The engine")
    assert site.client.get("/health").status_code == 200
    until(lambda: site.client.get("/ready").status_code == 200, START_S)
    assert site.restarts() == before + 1
    assert f"{death.said}; starting another" in site.server.log[told:]


def until(what: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


def test_whom_three_engines_in_a_row_ended_with_is_quarantined(
    site: Site, accused: Victim, died: list[str]
) -> None:
    """And nobody else is, though others were there each time or some of the times."""
    if len(died) < 3:
        pytest.skip("only after the three ends before it")
    with site.streams():
        reply = site.ask(accused.name)
        fails(reply, 409, "version_quarantined", "ended 3 times in a row", "Save the adapter anew")
        assert refused(upload(site.client, "again", accused.folder)) == ["engine_ended"]
    assert site.version(accused.name)["state"] == "quarantined"
    assert [site.version(name)["state"] for name in OTHERS] == ["ready"] * 3
