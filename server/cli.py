"""The command line: all commands, and what each failure means to the shell."""

import sys

from server import lifeline

# First of all: in a process of the engine, which imports this module before anything else, the
# imports that follow must not outlive a server that was killed meanwhile.
lifeline.follow()

import typer  # noqa: E402

from adapters.errors import AdapterError, InvalidAdapter  # noqa: E402
from server.commands import adapters, bench, keys, talk, top  # noqa: E402
from server.commands.remote import Refused, Unreachable  # noqa: E402
from server.commands.terminal import problem_lines  # noqa: E402
from server.errors import ServerError, describe  # noqa: E402
from server.logs import complain, console  # noqa: E402

EPILOG = (
    "Exit codes: 0 all is well; 1 refused or failed, as the server or the checks say; 2 wrong "
    "usage; 3 the server cannot be reached or is not ready; 130 interrupted.\n\n"
    "Environment: LORAPLEX_URL is the server that commands ask, LORAPLEX_API_KEY the key that they "
    "send, LORAPLEX_HOME the state folder of those that need no server."
)
EXPECTED = (Refused, Unreachable, AdapterError, ServerError, OSError, OverflowError)

cli = typer.Typer(
    help="One base model, any number of LoRA adapters, one server.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


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
    try:
        cli(prog_name="loraplex")
    except Exception as error:
        code = _explain(error)
        if code is None:
            raise
        sys.exit(code)


def _explain(error: Exception) -> int | None:
    """Says what went wrong, and gives the exit code; None if it is nobody's mistake but ours."""
    if not isinstance(error, EXPECTED):
        from server.config import ConfigError  # takes longer than most commands

        if not isinstance(error, ConfigError):
            return None
    if isinstance(error, InvalidAdapter):  # as a server would say it
        error = Refused(422, describe(error)[1]["error"])
    complain(str(error))
    if isinstance(error, Refused):
        for line in problem_lines(error.problems, "red"):
            console.print(line)
    return 3 if isinstance(error, Unreachable) else 1


if __name__ == "__main__":
    main()
