"""Adapters: upload, list, show, delete."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from adapters.folder import disk
from adapters.registry import Adapter, Version
from adapters.sources import archive
from server.errors import BadUpload
from server.routes import Json, Served, Serving
from server.routes.upload import Form, receive

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string", "description": "Name of the adapter."},
                        "files": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "The files that PEFT's save_pretrained wrote.",
                        },
                        "archive": {
                            "type": "string",
                            "format": "binary",
                            "description": "Or the folder, packed: .zip, .tar, .tar.gz.",
                        },
                        "alias": {"type": "string", "description": "Alias to point to it."},
                        "metadata": {"type": "string", "description": "A JSON object, kept as is."},
                    },
                }
            }
        },
    }
}


@router.post("", status_code=201, openapi_extra=_FORM)
async def upload(request: Request, serving: Served) -> JSONResponse:
    """Takes an adapter in: 201 and the version, or 200 if it has these bytes already."""
    limit = serving.settings.max_upload_mb * 10**6
    with serving.store.staging() as arrived, serving.store.staging() as folder:
        form = await receive(request, arrived, limit)
        name, alias, metadata = _fields(form)
        serving.ingest.check_name(name)
        await run_sync(_collect, form, folder, limit)
        version, created = await run_sync(
            serving.ingest.ingest, folder, name, "upload", alias, metadata
        )
    return JSONResponse(_show_version(serving, version), status_code=201 if created else 200)


@router.get("")
def every(
    serving: Served,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    after: Annotated[str | None, Query(description="`next` of the page before.")] = None,
    prefix: Annotated[str | None, Query(description="Only names that begin so.")] = None,
) -> Json:
    """Adapters by name, a page at a time."""
    page = serving.registry.list(after, limit, prefix)
    return {
        "object": "list",
        "data": [_show(serving, adapter) for adapter in page.data],
        "has_more": page.next is not None,
        "next": page.next,
    }


@router.get("/{name}")
def show(name: str, serving: Served) -> Json:
    """One adapter: its aliases, and its versions with their algebra and checks."""
    return _show(serving, serving.registry.get(name))


@router.get("/{name}/versions/{version}")
def show_version(name: str, version: str, serving: Served) -> Json:
    """One version, by number, alias or digest."""
    return _show_version(serving, serving.registry.show(f"{name}@{version}"))


@router.delete("/{name}")
async def delete(name: str, serving: Served) -> Json:
    """No new requests from now on; running ones finish, then the bytes go."""
    _let_go(serving, await run_sync(serving.registry.delete_adapter, name))
    return {"object": "adapter", "name": name, "deleted": True}


@router.delete("/{name}/versions/{version}")
async def delete_version(name: str, version: int, serving: Served) -> Json:
    """The same for one version; refused while an alias other than `latest` points to it."""
    _let_go(serving, await run_sync(serving.registry.delete_version, name, version))
    return {"object": "adapter.version", "name": name, "version": version, "deleted": True}


def _let_go(serving: Serving, digests: list[str]) -> None:
    if serving.gateway is not None:
        serving.gateway.retire(digests)
        return
    for digest in digests:  # no engine yet, so nobody uses them
        serving.ingest.collect(digest)


def _fields(form: Form) -> tuple[str, str | None, dict[str, Any] | None]:
    unknown = (form.fields.keys() | form.files.keys()) - {
        *("name", "alias", "metadata", "files", "archive")
    }
    if unknown:
        raise BadUpload(f"The form has unknown fields: {', '.join(sorted(unknown))}.")
    if not form.fields.get("name"):
        raise BadUpload("The form has no field `name`: what shall the adapter be called?", "name")
    metadata = None
    if text := form.fields.get("metadata"):
        try:
            metadata = json.loads(text)
        except ValueError as error:
            raise BadUpload(f"`metadata` is not JSON: {error}.", "metadata") from None
        if not isinstance(metadata, dict):
            raise BadUpload("`metadata` is not a JSON object.", "metadata")
    return form.fields["name"], form.fields.get("alias") or None, metadata


def _collect(form: Form, folder: Path, limit: int) -> None:
    """The adapter's files in `folder`, from loose files or from an archive."""
    loose, packed = form.files.get("files", []), form.files.get("archive", [])
    if bool(loose) == bool(packed) or len(packed) > 1:
        raise BadUpload("Send either the adapter's files in `files`, or one `archive`.", "files")
    if packed:
        archive.unpack(packed[0], folder, limit)
        return
    with disk("keep an upload"):
        for path in loose:
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


def _show_version(serving: Serving, version: Version) -> Json:
    gateway = serving.gateway
    shown = {
        "object": "adapter.version",
        "adapter": version.adapter,
        "version": version.number,
        "reference": version.reference,
        "digest": version.digest,
        "state": version.state,
        "created": int(version.created.timestamp()),
        "rank": version.rank,
        "alpha": version.alpha,
        "rslora": version.rslora,
        "target_modules": version.target_modules,
        "dtype": version.dtype,
        "bytes": version.bytes,
        "parameters": version.parameters,
        "base_model": version.base_model,
        "source": version.source,
        "residency": gateway.residency.tier(version.digest) if gateway else "disk",
        "leases": gateway.residency.leases(version.digest) if gateway else 0,
    }
    if version.checks is not None:
        shown["checks"] = version.checks
        shown["algebra"] = version.algebra
    return shown
