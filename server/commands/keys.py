"""`loraplex keys …` and `usage`: who may do what, and who used what, in a state folder."""

from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from server.commands.terminal import (
    AsJson,
    Home,
    bytes_text,
    existing,
    show,
    show_json,
    state_folder,
    table,
    tell,
)

if TYPE_CHECKING:
    from server.keys import Key, Keys, Limits

app = typer.Typer(
    help="API keys: who may do what. What is changed holds for the next request to a server that "
    "runs on the same state folder.",
    no_args_is_help=True,
)


Id = Annotated[str, typer.Argument(help="Its id, as `keys list` has it.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="For people: who or what it is for.")],
    scope: Annotated[
        list[str],
        typer.Option(
            help="What it may do, repeatable: infer, adapters:read, adapters:write, admin."
        ),
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
    requests_per_minute: Annotated[
        int | None, typer.Option(help="At most; what only reads counts for no limit.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="At most, of prompts and replies.")
    ] = None,
    concurrent_requests: Annotated[int | None, typer.Option(help="At most.")] = None,
    stored_mb: Annotated[
        int | None, typer.Option(help="At most, of all versions that it uploads.")
    ] = None,
    expires_days: Annotated[
        float | None, typer.Option(help="Days that it holds.", min=0, max=36500)
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a key, and print it: this once, since only its hash is kept."""
    from adapters.names import ANY
    from server.keys import Limits

    limits = Limits(
        requests_per_minute,
        tokens_per_minute,
        concurrent_requests,
        None if stored_mb is None else stored_mb * 10**6,
    )
    expires = None if expires_days is None else datetime.now(UTC) + timedelta(days=expires_days)
    patterns = tuple(adapters or [ANY])
    folder = state_folder(home)
    folder.mkdir(parents=True, exist_ok=True)

    def made(them: "Keys") -> tuple[bool, tuple["Key", str]]:
        first = not them.wanted()
        return first, them.create(name, tuple(scope), patterns, weight, limits, expires)

    first, (key, token) = _with_keys(folder, made)
    tell(f"key {key.id} for {key.name}: {', '.join(key.scopes)} on {', '.join(key.patterns)}")
    tell(f"it is for the server on {folder}" + ", which now wants a key of everybody" * first)
    _hand_out(key, token, as_json)


@app.command("list")
def every(home: Home = None, as_json: AsJson = False) -> None:
    """Show all keys, oldest first, with those that hold no more."""
    found = _with_keys(existing(home), lambda them: them.list())
    if as_json:
        show_json({"object": "list", "data": [key.as_dict() for key in found]})
        return
    if not found:
        tell("there are no keys: whoever reaches the server may do everything with it")
        return
    rows = table("id", "name", "scopes", "adapters", "weight", "limits", "created", "holds")
    rows.columns[0].no_wrap = True
    for key in found:
        rows.add_row(
            key.id,
            escape(key.name),
            " ".join(key.scopes),
            " ".join(key.patterns),
            f"{key.weight:g}",
            _limits(key.limits),
            f"{key.created:%Y-%m-%d}",
            _holds(key),
        )
    show(rows)


@app.command()
def revoke(id: Id, home: Home = None, as_json: AsJson = False) -> None:
    """End a key: requests with it are refused from now on, and those that run go on."""
    key = _with_keys(existing(home), lambda them: them.revoke(id))
    if as_json:
        show_json(key.as_dict())
    else:
        tell(f"revoked: {key.id}, {key.name}")


@app.command()
def rotate(
    id: Id,
    grace_s: Annotated[
        float,
        typer.Option(help="Seconds that the old one holds yet.", min=0, max=10**7),
    ] = 0.0,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make another key for the same id, and print it."""
    key, token = _with_keys(existing(home), lambda them: them.rotate(id, grace_s))
    tell(f"another key for {key.id}, {key.name}; the one before holds {grace_s:g} s")
    _hand_out(key, token, as_json)


def usage(
    since_hours: Annotated[float, typer.Option(help="How far back.", min=0, max=10**6)] = 24.0,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Print requests and tokens by API key and adapter, an hour each, as CSV."""
    from adapters.database import Database
    from server.usage import Usage, as_csv

    with closing(Database.of(existing(home))) as database:
        until = datetime.now(UTC)
        rows = Usage(database).read(until - timedelta(hours=since_hours), until)
        if as_json:
            show_json({"object": "list", "data": [row.as_dict() for row in rows]})
            return
        for line in as_csv(rows):
            print(line, end="")


def _with_keys(folder: Path, work: "Callable[[Keys], Any]") -> Any:
    from adapters.database import Database
    from server.keys import Keys

    with closing(Database.of(folder)) as database:
        return work(Keys(database))


def _hand_out(key: "Key", token: str, as_json: bool) -> None:
    if as_json:
        show_json(key.as_dict() | {"key": token})
    else:
        print(token)


def _limits(limits: "Limits") -> str:
    said = {
        "requests/min": limits.requests_per_minute,
        "tokens/min": limits.tokens_per_minute,
        "at once": limits.concurrent_requests,
    }
    given = [f"{limit:,} {what}" for what, limit in said.items() if limit]
    if limits.stored_bytes:
        given.append(f"{bytes_text(limits.stored_bytes)} stored")
    return ", ".join(given) or "none"


def _holds(key: "Key") -> str:
    if key.revoked is not None:
        return f"revoked {key.revoked:%Y-%m-%d}"
    if key.expires is None:
        return "yes"
    word = "expired" if key.expires <= datetime.now(UTC) else "until"
    return f"{word} {key.expires:%Y-%m-%d}"
