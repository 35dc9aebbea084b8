"""`loraplex adapters …`: what there is, how it comes in, what is wrong with it, where it is."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import httpx2
import typer
from rich.progress import track

from adapters import names
from adapters.errors import InvalidAdapter
from adapters.folder import wanted
from adapters.names import check_alias, check_name
from server.commands.panels import listing, of_adapter, of_check, of_version, place, remarks
from server.commands.remote import ANSWER_S, LOCAL, Json, Reference, Refused, Url, server
from server.commands.terminal import AsJson, Home, existing, interactive, show, show_json, tell
from server.commands.upload import byte_bar, files_of, name_of, send
from server.logs import complain, console

app = typer.Typer(
    help="Bring adapters in, look at them, load and remove them.", no_args_is_help=True
)

PAGE = 1000

Given = Annotated[
    str,
    typer.Argument(
        metavar="PATH|SOURCE",
        help="The folder that PEFT's save_pretrained wrote, or one packed as .zip, .tar, .tar.gz "
        "or .tar.zst; or what the server is to fetch: hf://org/name@revision, s3://…, gs://…, "
        "az://…, file:///….",
    ),
]


@app.command()
def add(
    source: Given,
    name: Annotated[
        str | None, typer.Option(help="What it is called; if left out, as its folder is.")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Alias to point to the new version.")] = None,
    metadata: Annotated[
        str | None, typer.Option(help='A JSON object to keep with it: \'{"owner": "me"}\'.')
    ] = None,
    url: Url = LOCAL,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter, or have the server fetch one; it can be asked at once."""
    kept = _metadata(metadata)
    name = check_name(name) if name else name_of(source)
    with server(url) as client:
        if "://" in source:
            version, new = _fetch(client, name, source, alias, kept)
        else:
            version, new = _upload(client, name, Path(source), alias, kept)
    if as_json:
        show_json(version | {"new": new})
        return
    print(version["reference"])
    tell("new: it can be asked at once" if new else "not new: it has these very bytes already")
    for line in remarks(version["checks"]):
        console.print(line)


def _metadata(text: str | None) -> Json | None:
    try:
        kept = None if text is None else json.loads(text)
    except ValueError:
        kept = ()
    if not isinstance(kept, dict | None):
        raise typer.BadParameter(
            'it must be a JSON object, like \'{"owner": "me"}\'', param_hint="--metadata"
        )
    return kept


def _upload(
    client: httpx2.Client, name: str, path: Path, alias: str | None, metadata: Json | None
) -> tuple[Json, bool]:
    fields = {"name": name} | ({"alias": alias} if alias else {})
    if metadata is not None:
        fields["metadata"] = json.dumps(metadata)
    reply = send(client, "/v1/adapters", path, fields)
    return reply.json(), reply.status_code == 201


def _fetch(
    client: httpx2.Client, name: str, source: str, alias: str | None, metadata: Json | None
) -> tuple[Json, bool]:
    body = {"name": name, "source": source, "alias": alias, "metadata": metadata}
    with byte_bar() as bar, client.sse("/v1/adapters", method="POST", json=body) as events:
        task = bar.add_task("waiting", total=None)
        for event in events:
            said: Any = event.json()
            if event.event == "error":
                raise Refused(422, said["error"])
            if event.event == "ready":
                return said, said.pop("new")
            done, total = said["bytes"], said["bytes_total"]
            bar.update(task, description=said["state"], completed=done, total=total)
    raise Refused(502, {"message": "The server ended without saying what became of the import."})


@app.command()
def check(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A PEFT folder, or one packed.")],
    home: Annotated[
        Path | None, typer.Option(help="State folder of the server that it is for.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model, as `serve` takes it.")] = None,
    max_lora_rank: Annotated[int | None, typer.Option(help="As `serve` takes it.")] = None,
    url: Annotated[
        str | None,
        typer.Option(envvar="LORAPLEX_URL", help="Ask this server, whose base then counts."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what an upload would be told, and the adapter's algebra; stores nothing of it.

    Needs no server: without one the base is what `serve` would serve with the same --home, --model
    and LORAPLEX_… variables, and is prepared in the state folder if it is not there yet. Exit code
    1 if anything is wrong.
    """
    flags = {"--home": home, "--model": model, "--max-lora-rank": max_lora_rank}
    given = [text for f, value in flags.items() if value is not None for text in (f, str(value))]
    source = context.get_parameter_source("url")
    if given and source is not None and source.name == "COMMANDLINE":
        raise typer.BadParameter(f"The server at --url has its own base: leave out {given[0]}.")
    if home is not None and not home.is_dir():
        raise typer.BadParameter(f"There is no folder {home}.", param_hint="--home")
    try:
        if url is not None and not given:
            with server(url) as client:
                seen = send(client, "/v1/adapters:check", path, {}).json()
        else:
            files_of(path)  # what is missing needs no base
            seen = _inspect(path, given)
    except InvalidAdapter as error:
        seen = _unreadable([problem.as_dict() for problem in error.problems])
    except Refused as error:
        if not error.problems:
            raise
        seen = _unreadable(error.problems)
    if as_json:
        show_json(seen)
    else:
        show(*of_check(seen))
    if not seen["ok"]:
        raise typer.Exit(1)


def _unreadable(problems: list[dict[str, str]]) -> Json:
    """A check of what is not even the files of an adapter."""
    checks: Json = {"problems": problems, "warnings": [], "advice": []}
    return {"object": "adapter.check", "ok": False, "checks": checks, "algebra": None}


def _inspect(path: Path, flags: list[str]) -> Json:
    """What a server with these flags would say of an adapter, without one."""
    from argparse import ArgumentParser

    from adapters.base import BaseSpec
    from adapters.ingest import inspect
    from adapters.sources import archive
    from adapters.sources.intake import Transfer
    from server.config import Settings
    from server.engine import base_model, launch
    from server.imports import rules

    settings = Settings.read(flags)
    # The engine's own flags are vLLM's to parse, which would take longer than all the rest.
    vllm = ArgumentParser(add_help=False, allow_abbrev=False)
    vllm.add_argument("--dtype", default="auto")
    args, _ = vllm.parse_known_args(settings.engine)
    with TemporaryDirectory() as scratch:
        staged = Path(scratch)
        limit, pickles = settings.max_upload_bytes, settings.allow_pickle
        if path.is_dir():
            files = [path / name for name in wanted(os.listdir(path), pickles)]
            Transfer(limit).expect(sum(file.stat().st_size for file in files))
            for file in files:
                shutil.copyfile(file, staged / file.name)
        else:
            archive.unpack(path, staged, limit, allow_pickle=pickles)
        launch.prepare_environment(settings.home)
        folder = base_model.fetch(settings, tell)
        base = BaseSpec.read(folder, settings.base_name)
        return inspect(staged, base, rules(settings, launch.dtype(args, folder))).as_dict()


@app.command("list")
def every(
    prefix: Annotated[str | None, typer.Option(help="Only names that begin so.")] = None,
    url: Url = LOCAL,
    as_json: AsJson = False,
) -> None:
    """Show all adapters, by name."""
    with server(url, ANSWER_S) as client:
        found = list(_pages(client, prefix))
    if as_json:
        show_json({"object": "list", "data": found, "has_more": False, "next": None})
        return
    if found:
        show(listing(found))
    else:
        tell("there are no adapters" + (f" that begin with {prefix}" if prefix else ""))


def _pages(client: httpx2.Client, prefix: str | None) -> Iterator[Json]:
    asked: dict[str, Any] = {"limit": PAGE} | ({"prefix": prefix} if prefix else {})
    while True:
        page = client.get("/v1/adapters", params=asked).json()
        yield from page["data"]
        if not page["has_more"]:
            return
        asked["after"] = page["next"]


def _parts(reference: str) -> tuple[str, str]:
    """The name in a reference, and what comes after its @, if anything. Raises InvalidReference."""
    names.Reference.parse(reference)
    name, _, which = reference.partition("@")
    return name, which


@app.command("show")
def one(reference: Reference, url: Url = LOCAL, as_json: AsJson = False) -> None:
    """Show an adapter with all its versions, or one: config, algebra, checks, where it is."""
    name, which = _parts(reference)
    with server(url, ANSWER_S) as client:
        adapter = client.get(f"/v1/adapters/{name}").json()
        version = client.get(f"/v1/adapters/{name}/versions/{which}").json() if which else None
    if as_json:
        show_json(version or adapter)
        return
    show(*(of_version(version) if version else of_adapter(adapter)))


@app.command()
def alias(
    reference: Reference,
    alias: Annotated[str, typer.Argument(help="Its other name: requests then write NAME@ALIAS.")],
    remove: Annotated[
        bool, typer.Option("--remove", help="Take the alias away; from @VERSION only, if given.")
    ] = False,
    url: Url = LOCAL,
    as_json: AsJson = False,
) -> None:
    """Point an alias to a version: `alias sql@2 prod`. Requests that run finish as they began."""
    name, which = _parts(reference)
    check_alias(alias)
    with server(url, ANSWER_S) as client:
        path = f"/v1/adapters/{name}/aliases/{alias}"
        if remove:
            expected = {"if-match": f'"{_number(client, reference)}"'} if which else {}
            reply = client.delete(path, headers=expected)
        else:
            reply = client.put(path, json={"version": _number(client, reference)})
    done = reply.json()
    if as_json:
        show_json(done)
    elif remove:
        tell(f"{name}@{alias} is no more")
    else:
        tell(f"{name}@{alias} is {name}@{done['version']}")


def _number(client: httpx2.Client, reference: str) -> int:
    """The number of the version that a reference means."""
    name, which = _parts(reference)
    found = client.get(f"/v1/adapters/{name}/versions/{which or 'latest'}").json()
    return int(found["version"])


@app.command()
def rm(
    reference: Reference,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = LOCAL,
    as_json: AsJson = False,
) -> None:
    """Remove an adapter, or one version: no new requests; its bytes go when running ones end."""
    name, which = _parts(reference)
    with server(url, ANSWER_S) as client:
        number = _number(client, reference) if which else None
        what = f"{name}@{number}" if which else _all_of(client, name)
        if not yes and not interactive():
            raise typer.BadParameter(f"Nobody can be asked whether {what} shall go: add --yes.")
        if not yes and console.input(f"Remove {what}? [y/N] ", markup=False).lower() != "y":
            raise typer.Exit(1)
        path = f"/v1/adapters/{name}" + (f"/versions/{number}" if which else "")
        done = client.delete(path).json()
    if as_json:
        show_json(done)
    else:
        tell(f"removed: {what}")


def _all_of(client: httpx2.Client, name: str) -> str:
    """An adapter with all that goes when it does."""
    adapter = client.get(f"/v1/adapters/{name}").json()
    count = len(adapter["versions"])
    aliases = sorted(adapter["aliases"].keys() - {"latest"})
    with_them = f" and the aliases {', '.join(aliases)}" if aliases else ""
    return f"{name} with {count} version{'s' * (count != 1)}{with_them}"


def _residency(verb: str, does: str) -> Callable[..., None]:
    def command(reference: Reference, url: Url = LOCAL, as_json: AsJson = False) -> None:
        _parts(reference)
        with server(url) as client:
            version = client.post(f"/v1/adapters/{reference}/{verb}").json()
        if as_json:
            show_json(version)
        else:
            tell(f"{version['reference']}: {place(version)}")

    return app.command(verb, help=does)(command)


_residency("load", "Have it in the engine's host cache before anybody asks.")
_residency("unload", "Take it out of the engine; refused while requests use it, or it is pinned.")
_residency("pin", "Load it and keep it loaded, restarts included.")
_residency("unpin", "Let it be evicted again.")


@app.command()
def verify(home: Home = None, as_json: AsJson = False) -> None:
    """Read every stored byte again and hold it against its digest.

    What is damaged is served no more, and what was damaged and is right again is. Needs no server,
    and disturbs none. Exit code 1 if anything is damaged.
    """
    from adapters.audit import audit
    from adapters.database import Database
    from adapters.registry import Registry
    from adapters.store import Store

    folder = existing(home)
    registry = Registry(Database.of(folder))

    def follow(digests: list[str]) -> Iterable[str]:
        quiet = not console.is_terminal
        return track(digests, "reading", transient=True, console=console, disable=quiet)

    found = audit(Store(folder / "store"), registry, full=True, track=follow)
    named = {digest: registry.references_to(digest) for digest in (*found.damaged, *found.mended)}
    registry.close()
    if as_json:
        damaged = [
            {"digest": digest, "references": named[digest], "reason": reason}
            for digest, reason in found.damaged.items()
        ]
        mended = [{"digest": digest, "references": named[digest]} for digest in found.mended]
        show_json({"checked": found.checked, "damaged": damaged, "mended": mended})
    else:
        for digest, reason in found.damaged.items():
            complain(f"{', '.join(named[digest])}: {reason}")
        for digest in found.mended:
            tell(f"served again: {', '.join(named[digest])}")
        tell(f"{found.checked - len(found.damaged)} of {found.checked} are as they were sealed")
    if found.damaged:
        raise typer.Exit(1)
