"""The commands that work on a state folder and need no server: adapters verify, keys, usage."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import rich.progress
import typer
from rich.console import Console
from rich.table import Column, Table

from adapters.audit import audit
from adapters.database import FILE, Database
from adapters.errors import AdapterError
from adapters.names import ANY
from adapters.registry import Registry
from adapters.store import Store
from server.config import PREFIX, ConfigError, Settings
from server.errors import ServerError
from server.keys import SCOPES, Key, Keys, Limits
from server.logs import complain, console, say
from server.usage import Usage, as_csv

adapters = typer.Typer(help="Look after stored adapters.", no_args_is_help=True)
keys = typer.Typer(
    help="API keys: who may do what. What is changed holds for the next request to a server that "
    "runs on the same state folder.",
    no_args_is_help=True,
)

WIDE = 300  # characters

Home = Annotated[
    Path | None,
    typer.Option(
        envvar=f"{PREFIX}HOME", help="State folder; the default is where `serve` keeps it."
    ),
]


@adapters.command()
def verify(home: Home = None) -> None:
    """Read every stored byte again and hold it against its digest.

    What is damaged is served no more, and what was damaged and is right again is. Needs no server,
    and disturbs none. Exit code 1 if anything is damaged.
    """
    with _complaining():
        if _verify(_existing(home)):
            raise typer.Exit(1)


def _verify(home: Path) -> bool:
    registry = Registry(Database.of(home))

    def track(digests: list[str]) -> Iterable[str]:
        return rich.progress.track(digests, "reading", transient=True, console=console)

    found = audit(Store(home / "store"), registry, full=True, track=track)
    for digest, reason in found.damaged.items():
        complain(f"{', '.join(registry.references_to(digest))}: {reason}")
    for digest in found.mended:
        say(f"served again: {', '.join(registry.references_to(digest))}")
    say(f"{found.checked - len(found.damaged)} of {found.checked} are as they were sealed")
    registry.close()
    return bool(found.damaged)


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="For people: who or what it is for.")],
    scope: Annotated[
        list[str], typer.Option(help=f"What it may do, repeatable: {', '.join(SCOPES)}.")
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            help="Names that it may use, repeatable: * stands for any text, `base` for the base "
            "model; without this option all of them."
        ),
    ] = None,
    weight: Annotated[
        float, typer.Option(help="Its share against other keys that call the same adapter.")
    ] = 1.0,
    requests_per_minute: Annotated[int | None, typer.Option(help="At most.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="At most, of prompts and replies.")
    ] = None,
    concurrent_requests: Annotated[int | None, typer.Option(help="At most.")] = None,
    stored_mb: Annotated[
        int | None, typer.Option(help="At most, of all versions that it uploads.")
    ] = None,
    expires_days: Annotated[float | None, typer.Option(help="Days that it holds.")] = None,
    home: Home = None,
) -> None:
    """Make a key, and print it: this once, since only its hash is kept."""
    limits = Limits(
        requests_per_minute,
        tokens_per_minute,
        concurrent_requests,
        None if stored_mb is None else stored_mb * 10**6,
    )
    expires = None if expires_days is None else datetime.now(UTC) + timedelta(days=expires_days)
    patterns = tuple(adapters or [ANY])
    key, token = _with_keys(
        home, lambda them: them.create(name, tuple(scope), patterns, weight, limits, expires)
    )
    say(f"key {key.id} for {key.name}: {', '.join(key.scopes)} on {', '.join(key.patterns)}")
    print(token)


@keys.command(name="list")
def every(home: Home = None) -> None:
    """Show all keys, oldest first, with those that hold no more."""
    others = ("name", "scopes", "adapters", "weight", "limits", "created", "holds")
    table = Table(Column("id", no_wrap=True), *others, box=None)
    for key in _with_keys(home, Keys.list):
        table.add_row(
            key.id,
            key.name,
            " ".join(key.scopes),
            " ".join(key.patterns),
            f"{key.weight:g}",
            _limits(key.limits),
            f"{key.created:%Y-%m-%d}",
            _holds(key),
        )
    out = Console()
    # A pipe has no width: what reads it is to find a key in a line.
    out.print(table, width=None if out.is_terminal else WIDE)


@keys.command()
def revoke(id: str, home: Home = None) -> None:
    """End a key: requests with it are refused from now on, and those that run go on."""
    key = _with_keys(home, lambda them: them.revoke(id))
    say(f"revoked: {key.id}, {key.name}")


@keys.command()
def rotate(
    id: str,
    grace_s: Annotated[float, typer.Option(help="Seconds that the old one holds yet.")] = 0.0,
    home: Home = None,
) -> None:
    """Make another key for the same id, and print it."""
    key, token = _with_keys(home, lambda them: them.rotate(id, grace_s))
    say(f"another key for {key.id}, {key.name}; the one before holds {grace_s:g} s")
    print(token)


def usage(
    since_hours: Annotated[float, typer.Option(help="How far back.")] = 24.0, home: Home = None
) -> None:
    """Print requests and tokens by API key and adapter, an hour each, as CSV."""
    with _complaining(), closing(Database.of(_existing(home))) as database:
        until = datetime.now(UTC)
        rows = Usage(database).read(until - timedelta(hours=since_hours), until)
        for line in as_csv(rows):
            print(line, end="")


def _with_keys(home: Path | None, work: Callable[[Keys], Any]) -> Any:
    with _complaining():
        folder = _folder(home)
        folder.mkdir(parents=True, exist_ok=True)
        with closing(Database.of(folder)) as database:
            return work(Keys(database))


def _folder(home: Path | None) -> Path:
    return Settings.read([] if home is None else ["--home", str(home)]).home


def _existing(home: Path | None) -> Path:
    """The state folder. Raises ConfigError if it is none."""
    folder = _folder(home)
    if not (folder / FILE).is_file():
        raise ConfigError(f"{folder} is no state folder of Loraplex: name it with --home")
    return folder


@contextmanager
def _complaining() -> Iterator[None]:
    try:
        yield
    except (ConfigError, AdapterError, ServerError, OSError, OverflowError) as error:
        complain(str(error))
        raise typer.Exit(1) from None


def _limits(limits: Limits) -> str:
    said = {
        "requests/min": limits.requests_per_minute,
        "tokens/min": limits.tokens_per_minute,
        "at once": limits.concurrent_requests,
        "bytes": limits.stored_bytes,
    }
    return ", ".join(f"{limit:,} {what}" for what, limit in said.items() if limit) or "none"


def _holds(key: Key) -> str:
    if key.revoked is not None:
        return f"revoked {key.revoked:%Y-%m-%d}"
    if key.expires is None:
        return "yes"
    word = "expired" if key.expires <= datetime.now(UTC) else "until"
    return f"{word} {key.expires:%Y-%m-%d}"
