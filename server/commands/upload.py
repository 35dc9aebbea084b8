"""An adapter on its way to a server: its files and its name, straight from the disk, with a bar."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import httpx2
import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from adapters.errors import InvalidName
from adapters.folder import FILES, wanted
from adapters.names import check_name
from server.logs import console


def name_of(source: str) -> str:
    """What an adapter is called where nobody says."""
    if "://" in source:
        from adapters.sources.address import Address  # slow to import

        name = Address.parse(source).parts[-1]
    else:
        path = Path(source).resolve()
        name = path.name
        for ending in () if path.is_dir() else (".zip", ".gz", ".zst", ".tgz", ".tar"):
            name = name.removesuffix(ending)
    try:
        return check_name(name)
    except InvalidName as error:
        raise typer.BadParameter(f"{error.message} Give it one with --name.") from None


def send(client: httpx2.Client, call: str, path: Path, fields: dict[str, str]) -> httpx2.Response:
    """Sends a form with the adapter in `path`, a folder or an archive, straight from the disk."""
    with ExitStack() as opened:
        bar = opened.enter_context(byte_bar())
        files = [
            (part, (file.name, opened.enter_context(file.open("rb"))))
            for part, file in files_of(path)
        ]
        total = sum(os.fstat(file.fileno()).st_size for _, (_, file) in files)
        task = bar.add_task("uploading", total=total)
        sent = [(part, (name, _Sent(file, bar, task))) for part, (name, file) in files]
        return client.post(call, data=fields, files=sent)  # type: ignore[arg-type]


def files_of(path: Path) -> list[tuple[str, Path]]:
    """What to send of an adapter's folder or archive, and as which field.

    Raises InvalidAdapter for a folder that lacks something, BadParameter for nothing at all.
    """
    if path.is_dir():
        return [("files", path / name) for name in wanted(os.listdir(path), allow_pickle=True)]
    if path.name in FILES:
        raise typer.BadParameter(f"{path} is a part of one: give the folder that it lies in.")
    if not path.is_file():
        raise typer.BadParameter(
            f"There is no folder or archive {path}. What the server is to fetch begins with hf://, "
            "s3://, gs://, az:// or file://."
        )
    return [("archive", path)]


class _Sent:
    """A file on its way to the server, which moves a bar as it is read."""

    def __init__(self, file: BinaryIO, bar: Progress, task: TaskID) -> None:
        self._file = file
        self._bar = bar
        self._task = task
        self.fileno = file.fileno  # from which the client knows the length

    def read(self, size: int) -> bytes:
        block = self._file.read(size)
        self._bar.advance(self._task, len(block))
        task = self._bar.tasks[self._task]
        if task.finished:
            self._bar.update(self._task, description="checking")
        return block


@contextmanager
def byte_bar() -> Iterator[Progress]:
    """A bar for bytes, with their rate and the time left; none where nobody looks."""
    columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        yield bar
