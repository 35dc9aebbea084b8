"""The command line: `loraplex serve` and `loraplex adapters verify`."""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from server import lifeline

# First of all: in a process of the engine, which imports this module before anything else, the
# heavy imports that follow must not outlive a server that was killed meanwhile.
lifeline.follow()

import rich.progress  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402

from adapters.audit import audit  # noqa: E402
from adapters.errors import AdapterError  # noqa: E402
from adapters.registry import Registry  # noqa: E402
from adapters.store import Store  # noqa: E402
from server.config import PREFIX, ConfigError, Settings  # noqa: E402

SHOWN = 10  # adapters named when the server is ready

console = Console(stderr=True, highlight=False)
cli = typer.Typer(
    help="One base model, any number of LoRA adapters, one server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


adapters = typer.Typer(help="Look after stored adapters.", no_args_is_help=True)
cli.add_typer(adapters, name="adapters")


@cli.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Serve a base model and its adapters over HTTP (`loraplex serve --help` lists the flags)."""
    try:
        _serve(Settings.read(context.args))
    except (ConfigError, AdapterError, OSError) as error:
        _complain(str(error))
        raise typer.Exit(1) from None


def _serve(settings: Settings) -> None:
    from server.engine import base_model, launch, progress

    began = time.monotonic()
    lifeline.hold()
    progress.begin()
    launch.prepare_environment(settings.home, settings.cpu_lora_op)
    listener = _listen(settings)
    settings.home.mkdir(parents=True, exist_ok=True)
    _say(f"Loraplex {version('loraplex')}, state in {settings.home}")
    folder = base_model.fetch(settings, _say)

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
            _say(remark)
        _say(f"ready after {time.monotonic() - began:.0f} s: {settings.base_name}")
        _say(f"adapters: {', '.join(names) or 'none yet'}")
        _say(f"http://{settings.host}:{settings.port}/v1  (try it: /docs; stop: Ctrl-C)")

    def start() -> Any:
        return launch.start(serving.args, settings.compile, _say)

    http = app.create_app(serving, start, done, _say)
    server = uvicorn.Server(uvicorn.Config(http, log_level="warning", timeout_graceful_shutdown=5))
    # uvicorn raises a signal that ended it once more when it is done; here that is a normal end.
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda *_: None)
    server.run(sockets=[listener])
    for error in failed:
        _complain(f"the engine did not start: {error}")
    # Not through the interpreter's own end: it would wait for a thread that starts an engine.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failed else 0)


@adapters.command()
def verify(
    home: Annotated[
        Path | None,
        typer.Option(
            envvar=f"{PREFIX}HOME", help="State folder; the default is where `serve` keeps it."
        ),
    ] = None,
) -> None:
    """Read every stored byte again and hold it against its digest.

    What is damaged is served no more, and what was damaged and is right again is. Needs no server,
    and disturbs none. Exit code 1 if anything is damaged.
    """
    try:
        settings = Settings.read([] if home is None else ["--home", str(home)])
        damaged = _verify(settings.home)
    except (ConfigError, AdapterError) as error:
        _complain(str(error))
        raise typer.Exit(1) from None
    raise typer.Exit(1 if damaged else 0)


def _verify(home: Path) -> bool:
    if not (home / "registry.db").is_file():
        _complain(f"{home} is no state folder of Loraplex: name it with --home")
        return True
    registry = Registry(f"sqlite:///{home / 'registry.db'}")

    def track(digests: list[str]) -> Iterable[str]:
        return rich.progress.track(digests, "reading", transient=True, console=console)

    found = audit(Store(home / "store"), registry, full=True, track=track)
    for digest, reason in found.damaged.items():
        _complain(f"{', '.join(registry.references_to(digest))}: {reason}")
    for digest in found.mended:
        _say(f"served again: {', '.join(registry.references_to(digest))}")
    _say(f"{found.checked - len(found.damaged)} of {found.checked} are as they were sealed")
    registry.close()
    return bool(found.damaged)


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


def _say(line: str) -> None:
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {line}", soft_wrap=True)


def _complain(text: str) -> None:
    for line in text.splitlines():
        console.print(f"loraplex: {line}", style="red", markup=False, soft_wrap=True)


def main() -> None:
    """Entry point of the `loraplex` command."""
    cli()


if __name__ == "__main__":
    main()
