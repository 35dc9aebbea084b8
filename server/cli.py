"""The command line: all commands, and what each failure means to the shell."""

import signal
import sys

from server import lifeline

# First of all: in a process of the engine, which imports this module before anything else, the
# imports that follow must not outlive a server that was killed meanwhile.
lifeline.follow()

# A command that is interrupted while it imports ends as any program does, without a traceback.
IS_COMMAND = __name__ == "__main__" or sys.argv[0].endswith("loraplex")
if IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from importlib.metadata import version  # noqa: E402
from typing import Annotated  # noqa: E402

import typer  # noqa: E402

from adapters.errors import (  # noqa: E402
    AdapterError,
    InvalidAdapter,
    InvalidName,
    InvalidReference,
    InvalidSource,
    ReservedName,
)
from server.commands import adapters, bench, keys, talk, top  # noqa: E402
from server.commands.remote import Refused, Unreachable  # noqa: E402
from server.commands.terminal import problem_lines, show_json  # noqa: E402
from server.errors import BadRequest, ServerError, describe  # noqa: E402
from server.logs import complain, console  # noqa: E402

EPILOG = (
    "Exit codes: 0 all is well; 1 refused or failed, as the server or the checks say; 2 wrong "
    "usage; 3 the server cannot be reached or is not ready; 130 interrupted.\n\n"
    "Environment: LORAPLEX_URL is the server that commands ask, LORAPLEX_API_KEY the key that they "
    "send, LORAPLEX_HOME the state folder of those that need no server."
)
USAGE = (InvalidName, InvalidReference, InvalidSource, ReservedName, BadRequest)
EXPECTED = (Refused, Unreachable, AdapterError, ServerError, OSError, OverflowError)

cli = typer.Typer(
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(version("loraplex"))
        raise typer.Exit


@cli.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One base model, any number of LoRA adapters, one server."""


@cli.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Serve a base model and its adapters over HTTP (`loraplex serve --help` lists the flags)."""
    from server.config import Settings
    from server.serve import serve

    serve(Settings.read(context.args))


cli.add_typer(adapters.app, name="adapters")
cli.command()(talk.chat)
cli.command()(talk.compare)
cli.command()(top.top)
cli.command()(bench.bench)
cli.add_typer(keys.app, name="keys")
cli.command()(keys.usage)


def main() -> None:
    """Entry point of the `loraplex` command."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        cli(prog_name="loraplex")
    except Exception as error:
        code = _explain(error)
        if code is None:
            raise
        sys.exit(code)


def _explain(error: Exception) -> int | None:
    """Says what went wrong, and gives the exit code; None if it is nobody's mistake but ours."""
    usage = isinstance(error, USAGE)
    if not isinstance(error, EXPECTED):
        from server.config import ConfigError, UsageError  # takes longer than most commands

        if not isinstance(error, ConfigError):
            return None
        usage = isinstance(error, UsageError)
    if isinstance(error, InvalidAdapter):  # as a server would say it
        error = Refused(422, describe(error)[1]["error"])
    complain(str(error))
    if isinstance(error, Refused):
        for line in problem_lines(error.problems, "red"):
            console.print(line)
    if "--json" in sys.argv:
        body = error.body if isinstance(error, Refused) else {"message": str(error)}
        show_json({"error": body})
    if isinstance(error, Unreachable):
        return 3
    return 2 if usage else 1


if __name__ == "__main__":
    main()
