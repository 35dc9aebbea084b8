"""`loraplex serve`: one server on one state folder, from its start to its end."""

import asyncio
import fcntl
import logging
import os
import socket
import sys
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import IO, Any

from adapters.database import FILE, Database
from server import lifeline, logs
from server.config import ConfigError, Settings, is_loopback
from server.keys import Keys
from server.logs import complain, say

SHOWN = 10  # adapters named when the server is ready


def serve(settings: Settings) -> None:
    """Serves until the process is told to end, and ends it.

    Raises ConfigError, AdapterError or OSError for what keeps it from beginning.
    """
    from server.engine import base_model, launch, progress

    began = time.monotonic()
    lifeline.hold()
    progress.begin()
    if settings.log_format == "json":
        logs.as_json()
    launch.prepare_environment(settings.home, settings.cpu_lora_op)
    keyed = _keyed(settings)
    listener = _listen(settings)
    if settings.engine:  # after what is quick to see, before anything is made or fetched
        launch.check_flags(settings.engine)
    settings.home.mkdir(parents=True, exist_ok=True)
    lock = _lock(settings.home)
    say(f"Loraplex {version('loraplex')}, state in {settings.home}")
    folder = base_model.fetch(settings, say)

    # vLLM takes seconds to import: what can go wrong before it has gone wrong by now.
    import uvicorn

    from server import app

    serving = app.build(settings, folder)
    failed: list[Exception] = []

    def done(error: Exception | None) -> None:
        if error is not None:
            failed.append(error)
            server.should_exit = True
            return
        page = serving.registry.list(limit=SHOWN)
        names = [adapter.name for adapter in page.data] + ["…"] * (page.next is not None)
        for remark in serving.remarks:
            say(remark)
        say(f"ready after {time.monotonic() - began:.0f} s: {settings.base_name}")
        say(f"adapters: {', '.join(names) or 'none yet'}")
        if not keyed:
            say(_NO_KEYS)
        say(f"http://{settings.host}:{settings.port}  (console; API at /v1; stop: Ctrl-C)")

    def start() -> Any:
        return launch.start(serving.args, settings.compile, say)

    class Server(uvicorn.Server):
        """Ends when what runs has ended, and at once when it is told to a second time."""

        loop: asyncio.AbstractEventLoop | None = None
        ending: asyncio.Future[None] | None = None

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            self.loop = asyncio.get_running_loop()
            await super().startup(sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if serving.ending or self.loop is None:
                os._exit(128 + sig)
            serving.ending = True
            self.loop.call_soon_threadsafe(self.end)

        def end(self) -> None:
            self.ending = asyncio.ensure_future(app.drain(serving))
            self.ending.add_done_callback(lambda _: setattr(self, "should_exit", True))

    http = app.create_app(serving, start, done, say)
    options: dict[str, Any] = {"log_config": None} if settings.log_format == "json" else {}
    server = Server(
        uvicorn.Config(http, log_level="warning", timeout_graceful_shutdown=5, **options)
    )
    server.run(sockets=[listener])
    for error in failed:
        complain(f"the engine did not start: {error}")
    lock.close()
    # Not through the interpreter's own end: it would wait for a thread that starts an engine.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failed else 0)


_NO_KEYS = "there are no API keys: whoever reaches this server may do everything with it"


def _lock(home: Path) -> IO[str]:
    """Holds the state folder for this process: two servers would undo each other's work in it.

    Raises ConfigError if another server has it.
    """
    lock = (home / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise ConfigError(
            f"another server (process {lock.read().strip() or 'unknown'}) uses the state folder "
            f"{home}: stop it, or name another folder with --home"
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def _keyed(settings: Settings) -> bool:
    """Whether requests need an API key. Raises ConfigError if others could come without one."""
    keyed = settings.admin_key is not None
    if not keyed and (settings.home / FILE).is_file():
        with closing(Database.of(settings.home)) as database:
            keyed = Keys(database).wanted()
    if keyed or settings.insecure or is_loopback(settings.host):
        return keyed
    raise ConfigError(
        f"without API keys this server listens on loopback only, not on {settings.host}: create a "
        "key (loraplex keys create), set LORAPLEX_ADMIN_KEY, or start with --insecure"
    )


def _listen(settings: Settings) -> socket.socket:
    """The listening socket, before the slow part: a port that is taken is said at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(2048)  # now: bound but not listening, two servers could have one port
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror} "
            "(choose another with --port)"
        ) from None
    return listener
