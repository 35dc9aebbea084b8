"""`loraplex chat` and `compare`: the base and its adapters, by what they say."""

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Annotated

import httpx2
import typer
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from server.commands.remote import (
    BASE,
    LOCAL,
    Json,
    Refused,
    Reply,
    Unreachable,
    Url,
    complete_name,
    complete_names,
    must_exist,
    names,
    server,
    stream,
)
from server.commands.terminal import AsJson, interactive, out, printable, show, show_json, tell
from server.logs import complain, console

REFRESH_S = 0.1
NARROWEST = 26  # characters of a column in a comparison
PANEL = 4  # characters of a panel that are not its text

Temperature = Annotated[
    float, typer.Option(min=0, help="How much is left to chance; 0 is always the likeliest token.")
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest reply, in tokens.")]
System = Annotated[str | None, typer.Option(help="What the model is told before all else.")]

HELP = """\
/adapter NAME   it answers from now on, and knows what was said; without NAME: who there is
/base           no adapter answers from now on
/system TEXT    what the model is told before all else; without TEXT: nothing
/reset          forgets what was said
/quit           leaves, as Ctrl-D does; Ctrl-C stops a reply
A line that ends with \\ goes on in the next."""


COMMANDS = set(re.findall(r"^(/\w+)", HELP, re.MULTILINE))


@dataclass
class Conversation:
    """Who answers, what was said so far, and how replies are made."""

    adapter: str
    system: str | None
    options: Json
    messages: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> Json:
        """What to ask for the next message."""
        before = [{"role": "system", "content": self.system}] if self.system else []
        return {"model": self.adapter, "messages": before + self.messages} | self.options


def chat(
    adapter: Annotated[
        str, typer.Option(help="Who answers at first.", autocompletion=complete_name)
    ] = BASE,
    system: System = None,
    temperature: Temperature = 0,
    max_tokens: MaxTokens = None,
    url: Url = LOCAL,
    as_json: AsJson = False,
) -> None:
    """Talk to the base or an adapter, and change in mid-conversation: /adapter NAME, /help.

    From a pipe, each line is a message, or one of the commands that /help lists, and the replies
    are all that is printed.
    """
    typed = interactive() and not as_json
    talk = Conversation(adapter, system, _options(temperature, max_tokens))
    with server(url) as client:
        must_exist(client, adapter)
    if typed:
        console.print(f"[dim]{escape(adapter)} at {escape(url)}; /help says what else there is")
    for line in _typed(talk) if typed else _piped():
        if line == "/quit":
            return
        # A client each: one whose connection broke is no use for the next line.
        with _going_on(typed), server(url) as client:
            if line.startswith("/") and (typed or line.split()[0] in COMMANDS):
                _command(client, talk, line)
            elif line.strip():
                _answer(client, talk, line, typed, as_json)


def _options(temperature: float, max_tokens: int | None) -> Json:
    given = {"temperature": temperature, "max_completion_tokens": max_tokens}
    return {name: value for name, value in given.items() if value is not None}


def _typed(talk: Conversation) -> Iterator[str]:
    """Lines of a person, with the arrow keys' history of them."""
    import readline  # noqa: F401 (input() uses it from now on)

    while True:
        try:
            line = input(f"{talk.adapter}> ")
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input("… ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # as in a shell: this line is not meant
            print()
            continue
        yield line


def _piped() -> Iterator[str]:
    return (line.rstrip("\n") for line in sys.stdin)


@contextmanager
def _going_on(typed: bool) -> Iterator[None]:
    """With a person, what fails is said, and the conversation goes on; else it is an error."""
    try:
        yield
    except (Refused, Unreachable) as error:
        if not typed:
            raise
        complain(str(error))


def _command(client: httpx2.Client, talk: Conversation, line: str) -> None:
    """Does what a line that begins with a slash says."""
    verb, _, rest = line.partition(" ")
    rest = rest.strip()
    if verb == "/adapter" and rest:
        must_exist(client, rest)
        talk.adapter = rest
    elif verb == "/adapter":
        models = client.get("/v1/models").json()["data"]
        tell(", ".join(each["id"] if each["parent"] else BASE for each in models))
    elif verb == "/base":
        talk.adapter = BASE
    elif verb == "/system":
        talk.system = rest or None
    elif verb == "/reset":
        talk.messages.clear()
    elif verb == "/help":
        console.print(HELP, markup=False, style="dim")
    else:
        raise Refused(400, {"message": f"there is no {verb}: /help says what there is"})


def _answer(
    client: httpx2.Client, talk: Conversation, line: str, typed: bool, as_json: bool
) -> None:
    """Says `line`, prints the reply as it comes, and keeps both."""
    talk.messages.append({"role": "user", "content": line})
    reply = Reply()
    try:
        # Closed, so that a reply that is stopped ends on the server too.
        with closing(stream(client, "/v1/chat/completions", talk.body(), reply)) as pieces:
            for piece in pieces:
                if not as_json:
                    print(printable(piece) if typed else piece, end="", flush=True)
    except KeyboardInterrupt:
        if not typed:
            raise
    finally:
        # What has no answer is not a part of the conversation.
        if reply.text:
            talk.messages.append({"role": "assistant", "content": reply.text})
        else:
            talk.messages.pop()
        if not as_json:
            print()
    if as_json:
        show_json({"adapter": talk.adapter} | reply.as_dict())
    elif typed:
        console.print(f"[dim]{_figures(reply)}")


def _figures(reply: Reply) -> str:
    """Who answered, and how fast."""
    return " · ".join([reply.reference or "no answer", *_rates(reply)])


def _rates(reply: Reply) -> Iterator[str]:
    if reply.first_token_s is not None:
        yield f"first token {reply.first_token_s:.2f} s"
    if reply.tokens_per_s is not None:
        yield f"{reply.tokens_per_s:.1f} tokens/s"


def compare(
    prompt: Annotated[
        str | None, typer.Argument(help="What all are asked; if left out, standard input.")
    ] = None,
    adapters: Annotated[
        str,
        typer.Option(
            help="Who is asked, after commas: base,sql,sql@2.", autocompletion=complete_names
        ),
    ] = BASE,
    system: System = None,
    temperature: Temperature = 0,
    max_tokens: MaxTokens = None,
    url: Url = LOCAL,
    as_json: AsJson = False,
) -> None:
    """Ask several adapters the same at once, and see their replies side by side."""
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter('Say what to ask: loraplex compare --adapters base,sql "…"')
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise typer.BadParameter("There is nothing to ask.")
    who = names(adapters)
    with server(url) as client:
        for name in who:
            must_exist(client, name)
    asked = [{"role": "user", "content": prompt}]
    options = _options(temperature, max_tokens)
    columns = [Column(Conversation(name, system, options, asked)) for name in who]
    threads = [threading.Thread(target=each.ask, args=(url,), daemon=True) for each in columns]
    for thread in threads:
        thread.start()
    if out.is_terminal and not as_json:
        with Live(console=out, transient=True, auto_refresh=False) as live:
            while any(thread.is_alive() for thread in threads):
                live.update(_side_by_side(columns, out.height - 4), refresh=True)
                time.sleep(REFRESH_S)
    for thread in threads:
        thread.join()
    failures = [column.failure for column in columns if column.failure is not None]
    if as_json:
        show_json({"object": "comparison", "data": [column.as_dict() for column in columns]})
    elif out.is_terminal:
        show(_side_by_side(columns))
    else:
        for column in columns:
            print(f"── {column.title}\n{column.text}\n")
    if failures and as_json:  # the rows have said so
        raise typer.Exit(3 if isinstance(failures[0], Unreachable) else 1)
    for failure in failures:
        raise failure


@dataclass
class Column:
    """One adapter's reply in a comparison; `failure` is why there is none, or not all of it."""

    talk: Conversation
    reply: Reply = field(default_factory=Reply)
    failure: Refused | Unreachable | None = None

    def ask(self, url: str) -> None:
        """Asks, and reads to the end."""
        try:
            with server(url) as client:
                for _ in stream(client, "/v1/chat/completions", self.talk.body(), self.reply):
                    pass
        except (Refused, Unreachable) as error:
            self.failure = error

    @property
    def title(self) -> str:
        """Who it is, and how fast."""
        return _figures(self.reply) if self.reply.reference else self.talk.adapter

    @property
    def text(self) -> str:
        """What was said so far, and why it ends."""
        return f"{self.reply.text}\n{self.failure or ''}".strip("\n")

    def as_dict(self) -> Json:
        """For JSON; the keys are stable."""
        error = {} if self.failure is None else {"error": str(self.failure)}
        return {"adapter": self.talk.adapter} | self.reply.as_dict() | error


def _side_by_side(columns: list[Column], height: int | None = None) -> Table:
    """The columns as far as they have come; in `height` lines, their ends."""
    abreast = max(1, min(len(columns), out.width // NARROWEST))
    rows = -(-len(columns) // abreast)
    grid = Table.grid(expand=True)
    for _ in range(abreast):
        grid.add_column(ratio=1)
    panels = []
    for column in columns:
        lines = list(Text(printable(column.text)).wrap(out, out.width // abreast - PANEL))
        if height is not None:
            lines = lines[-max(1, height // rows - PANEL) :]
        figures = Text(" · ".join(_rates(column.reply)), "dim")
        title = escape(column.reply.reference or column.talk.adapter)
        style = "red" if column.failure else "dim"
        panels.append(Panel(Text("\n").join([*lines, figures]), title=title, border_style=style))
    for first in range(0, len(panels), abreast):
        grid.add_row(*panels[first : first + abreast])
    return grid
