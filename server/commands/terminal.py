"""What all commands share of the terminal: options, tables or JSON, bars, problems in words."""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from server.logs import console

WIDE = 300  # characters of a line of a table, for who reads lines and not a screen

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

out = Console(highlight=False)

Home = Annotated[
    Path | None,
    typer.Option(
        envvar="LORAPLEX_HOME", help="State folder; the default is where `serve` keeps it."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def state_folder(home: Path | None) -> Path:
    """The state folder: `home`, or what the environment says. Raises ConfigError."""
    from server.config import Settings

    return Settings.read([] if home is None else ["--home", str(home)]).home


def existing(home: Path | None) -> Path:
    """The same; raises UsageError if there is none yet."""
    from adapters.database import FILE
    from server.config import UsageError

    folder = state_folder(home)
    if not (folder / FILE).is_file():
        raise UsageError(f"{folder} is no state folder of Loraplex: name it with --home")
    return folder


def interactive() -> bool:
    """Whether a person types and reads."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def show(*things: RenderableType) -> None:
    """Prints on standard output."""
    for thing in things:
        if out.is_terminal or not isinstance(thing, Table | Group):
            out.print(thing)
        else:  # a pipe has no width: what reads it is to find a row in a line
            Console(highlight=False, width=WIDE).print(thing)


def tell(text: str) -> None:
    """Says, on standard error, how a command went."""
    console.print(text, markup=False, soft_wrap=True)


def show_json(data: Any) -> None:
    """Prints one JSON document on standard output: indented for people, a line for programs."""
    indent = 2 if sys.stdout.isatty() else None
    print(json.dumps(data, ensure_ascii=False, indent=indent), flush=True)


def table(*columns: str, right: Iterable[str] = (), **more: Any) -> Table:
    """A table without lines; the columns named in `right` hold numbers."""
    made = Table(box=None, header_style="bold", pad_edge=False, **more)
    for column in columns:
        made.add_column(column, justify="right" if column in set(right) else "left")
    return made


def problem_lines(problems: Iterable[Mapping[str, str]], style: str) -> Iterator[RenderableType]:
    """Each problem (or warning, or advice) to print: its code and place, what it is, what to do."""
    for problem in problems:
        yield Text.assemble((problem["code"], style), "  ", (problem["where"], "bold"))
        yield Padding(Text(problem["message"]), (0, 0, 0, 4))
        yield Padding(Text(f"→ {problem['fix']}"), (0, 0, 0, 4))


def printable(text: str) -> str:
    """`text` without what would move the cursor or do worse: replies and metadata are anybody's."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def bytes_text(count: float) -> str:
    """`4.9 MB`: as many units of a thousand as fit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if count >= 99.5 or unit == "B" else f"{count:.3g} {unit}"


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table, `–` for none."""
    return "–" if value is None else f"{value:,.{digits}f}"
