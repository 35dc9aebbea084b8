"""Adapters: upload, import, check, list, show, alias, delete."""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import EllipsisType
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters import jsontext
from adapters.errors import AdapterNotFound, no_adapter
from adapters.folder import CONFIG, belongs, disk
from adapters.ingest import described
from adapters.names import name_of
from adapters.registry import Adapter, Version
from adapters.sources import archive
from server.errors import BadRequest, Forbidden, describe
from server.gateway import Gateway
from server.imports import Import
from server.keys import Key
from server.routes import Json, Served, Serving
from server.routes.access import Asker
from server.routes.upload import MAX_FIELD, Form, receive

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])

PROGRESS_S = 0.25  # between two looks at an import that somebody follows


def _named(name: str, asker: Asker) -> str:
    """The name, or reference, in a path, if it is one that the key may use."""
    if not asker.sees(adapter := name_of(name)):
        raise no_adapter(adapter)
    return name


Named = Annotated[str, Depends(_named)]


def may_bring(asker: Key, name: str) -> None:
    """Raises Forbidden if an adapter that the key brings may not have this name."""
    if not asker.sees(name):
        raise Forbidden(f"With this API key, names of adapters are {', '.join(asker.patterns)}.")


class ImportRequest(BaseModel):
    """Body of POST /v1/adapters as JSON: the server fetches the adapter itself."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Name of the adapter.")
    source: str = Field(
        description="hf://org/name[@revision][/folder], s3://bucket/prefix, gs://…, az://…, or "
        "file:///folder, within what the server's --import-from allows.",
        examples=["hf://org/name@main"],
    )
    alias: str | None = Field(default=None, description="Alias to point to the version.")
    metadata: dict[str, Any] | None = Field(default=None, description="Kept as it is.")


_FILES = {
    "files": {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "description": "The files that PEFT's save_pretrained wrote.",
    },
    "archive": {
        "type": "string",
        "format": "binary",
        "description": "Or the folder, packed: .zip, .tar, .tar.gz, .tar.zst.",
    },
}
_FIELDS = {
    "name": {"type": "string", "description": "Name of the adapter."},
    "alias": {"type": "string", "description": "Alias to point to it."},
    "metadata": {"type": "string", "description": "A JSON object, kept as it is."},
}


def _form(required: list[str], fields: Json, **others: Json) -> Json:
    schema = {"type": "object", "required": required, "properties": fields | _FILES}
    content = {"multipart/form-data": {"schema": schema}, **others}
    return {"requestBody": {"required": True, "content": content}}


_ANSWERS: dict[int | str, Json] = {
    200: {
        "description": "The adapter has these bytes already; or the progress of an import.",
        "content": {"application/json": {}, "text/event-stream": {"schema": {"type": "string"}}},
    },
    202: {"description": "The import goes on.", "content": {"application/json": {}}},
}
_JSON = {"application/json": {"schema": ImportRequest.model_json_schema()}}


@router.post(
    "", status_code=201, responses=_ANSWERS, openapi_extra=_form(["name"], _FIELDS, **_JSON)
)
async def add(
    request: Request,
    serving: Served,
    asker: Asker,
    accept: Annotated[str, Header(description="text/event-stream: progress of an import.")] = "",
    prefer: Annotated[str, Header(description="respond-async: 202 at once, for an import.")] = "",
) -> Response:
    """Takes an adapter in: 201 and the version, or 200 if it has these bytes already.

    A form uploads its files; JSON names a source that the server fetches.
    """
    if (
        request.headers.get("content-type", "").partition(";")[0].strip().lower()
        != "application/json"
    ):
        return await _upload(request, serving, asker)
    asked = await _import_request(request)
    may_bring(asker, asked.name)
    one = serving.imports.begin(asked.name, asked.source, asked.alias, asked.metadata, asker.owner)
    if "text/event-stream" in accept:
        return StreamingResponse(_follow(serving, one), media_type="text/event-stream")
    if "respond-async" in prefer:
        headers = {"location": f"/v1/adapters/{one.name}", "preference-applied": "respond-async"}
        return JSONResponse(_show_import(one), status_code=202, headers=headers)
    return await run_sync(_taken, serving, *await serving.imports.end(one))


@router.post(":check", openapi_extra=_form([], {}))
async def check(request: Request, serving: Served) -> Json:
    """What an upload of these files would be told, and their algebra; stores nothing."""
    async with _received(request, serving) as (form, folder):
        _refuse_others(form, set())
        await run_sync(_collect, form, folder, serving)
        seen = await serving.imports.check(serving.ingest.check, folder)
    return seen.as_dict()


@asynccontextmanager
async def _received(request: Request, serving: Serving) -> AsyncIterator[tuple[Form, Path]]:
    """A request's form, its files on disk, and an empty staging folder for the adapter in it."""
    with serving.store.staging() as arrived, serving.store.staging() as folder:
        yield await receive(request, arrived, serving.settings.max_upload_bytes), folder


async def _upload(request: Request, serving: Serving, asker: Key) -> Response:
    async with _received(request, serving) as (form, folder):
        name, alias, metadata = _fields(form)
        may_bring(asker, name)
        serving.ingest.check_name(name)
        await run_sync(_collect, form, folder, serving)
        added = await serving.imports.ingest(folder, name, "upload", alias, metadata, asker.owner)
    return await run_sync(_taken, serving, *added)


def _taken(serving: Serving, version: Version, created: bool) -> JSONResponse:
    return JSONResponse(_show_version(serving, version), status_code=201 if created else 200)


async def _import_request(request: Request) -> ImportRequest:
    text = b""
    async for chunk in request.stream():
        text += chunk
        if len(text) > MAX_FIELD:
            raise BadRequest(f"The body has more than {MAX_FIELD} bytes.")
    try:
        return ImportRequest.model_validate(_object(text, "the body"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadRequest(f"{where}: {first['msg']}" if where else first["msg"], where) from None


async def _follow(serving: Serving, one: Import) -> AsyncIterator[str]:
    """Server-sent events: `progress` as it changes, then `ready` with the version or `error`."""
    said = None
    while one.ended is None:
        if (now := _show_import(one)) != said:
            said = now
            yield _event("progress", now)
        await asyncio.sleep(PROGRESS_S)
    if one.version is not None:
        # Beside the version what 200 or 201 would say.
        yield _event("ready", _show_version(serving, one.version) | {"new": one.created})
    elif one.error is not None:
        yield _event("error", describe(one.error)[1])


def _event(kind: str, data: Json) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


@router.get("")
def every(
    serving: Served,
    asker: Asker,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    after: Annotated[str | None, Query(description="`next` of the page before.")] = None,
    prefix: Annotated[str | None, Query(description="Only names that begin so.")] = None,
) -> Json:
    """Adapters that the key may use, by name, a page at a time."""
    page = serving.registry.list(after, limit, prefix, asker.patterns)
    return {
        "object": "list",
        "data": [_show(serving, adapter) for adapter in page.data],
        "has_more": page.next is not None,
        "next": page.next,
    }


@router.get("/{name}")
async def show(name: Named, serving: Served) -> Json:
    """One adapter: its aliases, versions, imports, and usage by hour in the last day.

    The newest version has its algebra and checks with it.
    """
    imports = [_show_import(one) for one in serving.imports.of(name)]
    try:
        adapter = await run_sync(serving.registry.get, name)
    except AdapterNotFound:
        if all("version" in one for one in imports):  # it was there, and was deleted since
            raise
        nothing: Json = {"versions": [], "aliases": {}, "created": None, "metadata": {}}
        return {"object": "adapter", "name": name, **nothing, "imports": imports}
    return await run_sync(_show_whole, serving, adapter) | {"imports": imports}


@router.get("/{name}/versions/{version}")
def show_version(name: Named, version: str, serving: Served) -> Json:
    """One version, by number, alias or digest."""
    return _show_version(serving, serving.registry.show(f"{name}@{version}"))


@router.put("/{name}/aliases/{alias}")
async def set_alias(
    name: Named,
    alias: str,
    serving: Served,
    response: Response,
    version: Annotated[int, Body(embed=True, ge=1, description="Number of a ready version.")],
    if_match: Annotated[str | None, Header(description='Only if it points to this: "3".')] = None,
    if_none_match: Annotated[str | None, Header(description="*: only if there is none.")] = None,
) -> Json:
    """Points an alias to a version, whatever it pointed to before unless `If-Match` says so.

    Requests that run finish on the version they began with.
    """
    expected = _expected(if_match, if_none_match)
    await run_sync(serving.registry.set_alias, name, alias, version, expected)
    response.headers["etag"] = f'"{version}"'
    return {"object": "adapter.alias", "adapter": name, "alias": alias, "version": version}


@router.delete("/{name}/aliases/{alias}")
async def delete_alias(
    name: Named,
    alias: str,
    serving: Served,
    if_match: Annotated[str | None, Header(description='Only if it points to this: "3".')] = None,
) -> Json:
    """Removes an alias."""
    expected = _expected(if_match)
    await run_sync(serving.registry.delete_alias, name, alias, expected)
    return {"object": "adapter.alias", "adapter": name, "alias": alias, "deleted": True}


@router.delete("/{name}")
async def delete(name: Named, serving: Served) -> Json:
    """No new requests from now on; running ones finish, then the bytes go."""
    await serving.let_go(await run_sync(serving.registry.delete_adapter, name))
    return {"object": "adapter", "name": name, "deleted": True}


@router.delete("/{name}/versions/{version}")
async def delete_version(name: Named, version: int, serving: Served) -> Json:
    """The same for one version; refused while an alias other than `latest` points to it."""
    await serving.let_go(await run_sync(serving.registry.delete_version, name, version))
    return {"object": "adapter.version", "name": name, "version": version, "deleted": True}


@router.post("/{name}/load")
async def load(name: Named, serving: Served) -> Json:
    """Has an adapter (or a version, by reference) in the engine's host cache."""
    gateway, version = await _meant(name, serving)
    await gateway.load(version)
    return await run_sync(_show_version, serving, version)


@router.post("/{name}/unload")
async def unload(name: Named, serving: Served) -> Json:
    """Takes it out of the engine; refused while requests use it, or it is pinned."""
    gateway, version = await _meant(name, serving)
    gateway.unload(version)
    return await run_sync(_show_version, serving, version)


@router.post("/{name}/pin")
async def pin(name: Named, serving: Served) -> Json:
    """Loads it and keeps it loaded, restarts included."""
    gateway, version = await _meant(name, serving)
    # Noted first: whoever unpins another at this moment goes by what is noted.
    await run_sync(serving.registry.pin, version, True)
    try:
        await gateway.pin(version)
    except Exception:
        await run_sync(serving.registry.pin, version, version.pinned)
        raise
    return await run_sync(_show_version, serving, replace(version, pinned=True))


@router.post("/{name}/unpin")
async def unpin(name: Named, serving: Served) -> Json:
    """Lets it be evicted again."""
    _, version = await _meant(name, serving)
    await run_sync(serving.registry.pin, version, False)
    await serving.settle_pins()
    return await run_sync(_show_version, serving, replace(version, pinned=False))


async def _meant(name: str, serving: Serving) -> tuple[Gateway, Version]:
    """Who loads and unloads, and the version that a reference means."""
    gateway, _ = serving.ready()
    return gateway, await gateway.resolve(name, "name")


def _expected(if_match: str | None, if_none_match: str | None = None) -> int | EllipsisType | None:
    """What an alias must point to now: a number, None for no such alias, … for anything."""
    if if_none_match is not None:
        if if_none_match.strip() != "*" or if_match is not None:
            raise BadRequest("If-None-Match can only be *, and not beside If-Match.")
        return None
    if if_match is None or if_match.strip() == "*":
        return ...
    found = re.fullmatch(r'"([1-9][0-9]{0,8})"', if_match.strip())
    if found is None:
        raise BadRequest('If-Match is the version\'s number in quotes, like "3".')
    return int(found[1])


def _refuse_others(form: Form, known: set[str]) -> None:
    if unknown := (form.fields.keys() | form.files.keys()) - known - {"files", "archive"}:
        raise BadRequest(f"The form has unknown fields: {', '.join(sorted(unknown))}.")


def _fields(form: Form) -> tuple[str, str | None, dict[str, Any] | None]:
    _refuse_others(form, {"name", "alias", "metadata"})
    if not form.fields.get("name"):
        raise BadRequest("The form has no field `name`: what shall the adapter be called?", "name")
    metadata = None
    if text := form.fields.get("metadata"):
        metadata = _object(text.encode(), "metadata")
    return form.fields["name"], form.fields.get("alias") or None, metadata


def _object(text: bytes, what: str) -> Json:
    """The JSON object in `text`, if it is one that a database and a reply can carry."""
    try:
        return jsontext.parse(text)
    except ValueError as error:
        raise BadRequest(f"{what} is no JSON object that can be kept: {error}.", what) from None


def _collect(form: Form, folder: Path, serving: Serving) -> None:
    """The adapter's files in `folder`, from loose files or from an archive."""
    loose, packed = form.files.get("files", []), form.files.get("archive", [])
    if bool(loose) == bool(packed) or len(packed) > 1:
        raise BadRequest("Send either the adapter's files in `files`, or one `archive`.", "files")
    if packed:
        settings = serving.settings
        limit, allow_pickle = settings.max_upload_bytes, settings.allow_pickle
        archive.unpack(packed[0], folder, limit, allow_pickle=allow_pickle)
        return
    with disk("keep an upload"):
        for path in filter(lambda each: belongs(each.name), loose):
            shutil.move(path, folder)


def _show(serving: Serving, adapter: Adapter) -> Json:
    return {
        "object": "adapter",
        "name": adapter.name,
        "versions": [_show_version(serving, version) for version in adapter.versions],
        "aliases": dict(adapter.aliases),
        "created": int(adapter.created.timestamp()),
        "metadata": dict(adapter.metadata),
    }


def _show_whole(serving: Serving, adapter: Adapter) -> Json:
    since = datetime.now(UTC) - timedelta(days=1)
    hours = [used.as_dict() for used in serving.usage.of(adapter.name, since)]
    usage = [{k: v for k, v in hour.items() if k not in ("key", "adapter")} for hour in hours]
    return _show(serving, adapter) | {"usage": usage}


def _show_version(serving: Serving, version: Version) -> Json:
    gateway = serving.gateway
    shown: Json = {
        "object": "adapter.version",
        "adapter": version.adapter,
        "version": version.number,
        "reference": version.reference,
        "digest": version.digest,
        "state": version.state,
        "created": int(version.created.timestamp()),
        **described(version),
        "source": version.source,
        **({"reason": version.reason} if version.reason else {}),
        "residency": gateway.residency.tier(version.digest) if gateway else "disk",
        "resident_bytes": gateway.residency.size(version.digest) if gateway else 0,
        "pinned": version.pinned,
        "leases": gateway.residency.leases(version.digest) if gateway else 0,
    }
    if version.checks is not None:
        shown["config"] = _config(serving, version.digest)
        shown["checks"] = version.checks
        shown["algebra"] = version.algebra
    return shown


def _config(serving: Serving, digest: str) -> Json | None:
    """The adapter's own config; None where its bytes are damaged."""
    try:
        config = json.loads((serving.store.path(digest) / CONFIG).read_bytes())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _show_import(one: Import) -> Json:
    shown = {
        "object": "adapter.import",
        "id": one.id,
        "adapter": one.name,
        "source": one.source,
        "state": one.state,
        "bytes": one.transfer.done,
        "bytes_total": one.transfer.total,
        "begun": int(one.begun),
        "ended": None if one.ended is None else int(one.ended),
    }
    if one.version is not None:
        shown["version"] = one.version.number
    if one.error is not None:
        shown["error"] = describe(one.error)[1]["error"]
    return shown
