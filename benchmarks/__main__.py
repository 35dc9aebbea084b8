"""The command line: `python -m benchmarks run WORKLOAD.toml` and `… report FOLDER`."""

import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import measure, report, workload
from benchmarks.gguf import GgufError
from benchmarks.load import LoadError
from benchmarks.targets import TargetError
from benchmarks.workload import WorkloadError
from server.config import ConfigError

console = Console(stderr=True, highlight=False)
cli = typer.Typer(
    help="The same work for Loraplex and its peers, measured in one run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@cli.command()
def run(
    file: Annotated[
        Path, typer.Argument(help="The workload, e.g. benchmarks/workloads/bars.toml.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; default: results/<name>.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, after a warm-up.")] = 5,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; repeatable.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Only this target; repeatable.")] = None,
) -> None:
    """Run a workload, write raw data, table and plots."""
    # An end from outside is as orderly as Ctrl-C: servers must not outlive us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        wanted = workload.read(file).only(case or [], target or [])
        folder = out or Path(__file__).parent / "results" / wanted.name
        measure.run(wanted, folder, rounds, _say)
        _show(folder)
    except (WorkloadError, TargetError, LoadError, GgufError, ConfigError) as error:
        _complain(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@cli.command(name="report")
def redraw(folder: Annotated[Path, typer.Argument(help="The results of a run.")]) -> None:
    """Draw table and plots anew from a run's raw data."""
    try:
        _show(folder)
    except WorkloadError as error:
        _complain(error)


def _show(folder: Path) -> None:
    typer.echo(report.write(folder))
    _say(f"written: {folder}")


def _say(line: str) -> None:
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim]", end=" ")
    console.print(line, markup=False, soft_wrap=True)


def _complain(error: Exception) -> None:
    console.print(f"benchmarks: {error}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    cli()
