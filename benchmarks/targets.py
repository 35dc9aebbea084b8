"""The servers: how each kind is started, when it is ready, and how it is paused and ended."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]

from benchmarks import gguf
from benchmarks.load import Dialect, Llama, OpenAI
from benchmarks.workload import Target
from server.config import DEFAULT_MODEL
from server.engine.launch import ENVIRONMENT

ROOT = Path(__file__).parent.parent
START_S = 600  # stock vLLM with torch.compile takes two minutes on two quiet cores
STOP_S = 20
HOST = "127.0.0.1"


class TargetError(Exception):
    """A server did not start, or refused an adapter; the message has the end of its log."""


@dataclass(frozen=True)
class Material:
    """What servers serve: the base's folder, name → folder of every adapter, a folder to keep
    converted files in."""

    base: Path
    adapters: dict[str, Path]
    cache: Path


class Server:
    """One target as a process on a free port of loopback, and all processes it starts."""

    def __init__(
        self, name: str, target: Target, environment: dict[str, str], material: Material, own: Path
    ) -> None:
        """`own` is a folder for the server's state and log; what is there survives a restart."""
        self.name = name
        self.port = _free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.log = own / "server.log"
        own.mkdir(parents=True, exist_ok=True)
        kind = _KINDS[target.kind](target, material, self.port, own)
        self.dialect = kind.dialect
        self._ready = kind.ready
        self._prepare = kind.prepare
        self._command = [*kind.command, *target.flags]
        places = {"cores": f"0-{(os.cpu_count() or 1) - 1}", "prefix": sys.prefix}
        self._environment = _clean_environment() | kind.environment
        for key, value in (environment | target.environment).items():
            self._environment[key] = value.format_map(places)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Seconds from the command to ready. Adapters that are uploaded come after that.

        Raises:
            TargetError: it ended, or was not ready within START_S.
        """
        began = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches us only, and we end it in order
            )
        with httpx.Client(base_url=self.url, timeout=5) as http:
            while time.monotonic() - began < START_S:
                if self._process.poll() is not None:
                    raise TargetError(f"{self.name} ended while it started:\n{self._last_words()}")
                try:
                    if http.get(self._ready).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
            else:
                raise TargetError(f"{self.name} is not ready after {START_S} s, log: {self.log}")
        took = time.monotonic() - began
        self._prepare(self.url)
        return took

    def pause(self) -> None:
        """Stops every process of it (SIGSTOP): it takes no CPU until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def memory_gib(self) -> float:
        """Memory that its processes have for themselves, shared pages counted once each."""
        total = 0
        for process in self.processes():
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total / 2**30

    def stop(self) -> None:
        """Ends it and everything that it has started, paused or not."""
        if self._process is None:
            return
        tree = self.processes()  # before: children of an ended parent are nobody's
        self._signal(signal.SIGTERM, tree[:1])
        self._signal(signal.SIGCONT, tree)
        self._signal(signal.SIGKILL, _alive_after(STOP_S, tree))
        _alive_after(STOP_S, tree)
        self._process.wait()
        self._process = None

    def processes(self) -> list[psutil.Process]:
        """Those of it that run, the one that was started first."""
        if self._process is None:
            return []
        try:
            top = psutil.Process(self._process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, what: signal.Signals, tree: list[psutil.Process] | None = None) -> None:
        for process in self.processes() if tree is None else tree:
            try:
                process.send_signal(what)
            except psutil.NoSuchProcess:
                continue

    def _last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])


def _alive_after(seconds: float, tree: list[psutil.Process]) -> list[psutil.Process]:
    """Those of `tree` that still run after `seconds`, or none as soon as none does.

    A process that has ended and that nobody reaps (its parent ended first) does not run.
    """
    deadline = time.monotonic() + seconds
    while alive := [process for process in tree if _runs(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _clean_environment() -> dict[str, str]:
    """Ours, without settings of a developer; what Loraplex sets for vLLM, everybody gets."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LORAPLEX_", "VLLM_", "OMP_", "_LORAPLEX_"))
    }
    return ours | ENVIRONMENT


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def _nothing(url: str) -> None:
    """Adapters that are named on the command line are there when the server is."""


@dataclass(frozen=True)
class _Kind:
    command: list[str]
    ready: str
    dialect: Dialect
    environment: dict[str, str]
    prepare: Callable[[str], None] = _nothing


def _of_sets(target: Target, material: Material) -> dict[str, Path]:
    return {
        name: folder
        for name, folder in material.adapters.items()
        if name.rpartition("-")[0] in target.adapters
    }


def _compiled(material: Material) -> dict[str, str]:
    """What torch.compile makes is kept from run to run: it costs a minute for each target."""
    return {"VLLM_CACHE_ROOT": str(material.cache.parent / "engine")}


def _loraplex(target: Target, material: Material, port: int, own: Path) -> _Kind:
    adapters = _of_sets(target, material)
    link = own / "home" / "base" / DEFAULT_MODEL
    if not link.is_symlink():
        link.parent.mkdir(parents=True)
        link.symlink_to(material.base)

    def upload(url: str) -> None:
        for name, folder in adapters.items():
            files = [
                ("files", (file, (folder / file).read_bytes()))
                for file in ("adapter_config.json", "adapter_model.safetensors")
            ]
            sent = httpx.post(f"{url}/v1/adapters", data={"name": name}, files=files, timeout=120)
            if sent.status_code not in (200, 201):
                raise TargetError(f"loraplex refused {name}: {sent.status_code} {sent.text[:500]}")

    command = [str(Path(sys.executable).with_name("loraplex")), "serve", "--no-demo-adapters"]
    command += ["--port", str(port), "--home", str(own / "home")]
    command += ["--dtype", "bfloat16"]  # as the others, whatever the CPU
    return _Kind(command, "/ready", OpenAI(), _compiled(material), upload)


def _vllm(target: Target, material: Material, port: int, own: Path) -> _Kind:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", HOST, "--port", str(port), "--model", str(material.base)]
    command += ["--served-model-name", "base", "--disable-uvicorn-access-log"]
    if adapters := _of_sets(target, material):
        command += ["--enable-lora", "--max-cpu-loras", str(max(32, len(adapters)))]
        command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    # Stock means stock: Loraplex' own plugin is installed here, and vLLM loads all it finds.
    environment = {"VLLM_PLUGINS": ""} | _compiled(material)
    return _Kind(command, "/health", OpenAI(), environment)


def _peft(target: Target, material: Material, port: int, own: Path) -> _Kind:
    command = [sys.executable, "-m", "benchmarks.peft_server", "--port", str(port)]
    command += ["--base", str(material.base)]
    for name, folder in _of_sets(target, material).items():
        command += ["--adapter", f"{name}={folder}"]
    return _Kind(command, "/health", OpenAI(), {})


def _llama(target: Target, material: Material, port: int, own: Path) -> _Kind:
    cores = str(os.cpu_count() or 1)
    adapters = _of_sets(target, material)
    command = [str(gguf.SERVER), "--host", HOST, "--port", str(port)]
    command += ["-m", str(gguf.base(material.base, material.cache)), "-t", cores, "-tb", cores]
    for folder in adapters.values():
        command += ["--lora", str(gguf.adapter(folder, material.base, material.cache))]
    command += ["--lora-init-without-apply"] if adapters else []
    return _Kind(command, "/health", Llama(list(adapters)), {})


_KINDS: dict[str, Callable[[Target, Material, int, Path], _Kind]] = {
    "loraplex": _loraplex,
    "vllm": _vllm,
    "peft": _peft,
    "llama": _llama,
}
