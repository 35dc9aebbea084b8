"""What can be asked for, as OpenAI lists models."""

from anyio.to_thread import run_sync
from fastapi import APIRouter
from fastapi.responses import JSONResponse

from adapters.errors import AdapterNotFound, InvalidReference
from server.routes import Json, Served, Serving

router = APIRouter(prefix="/v1/models", tags=["inference"])


@router.get("")
def every(serving: Served) -> JSONResponse:
    """The base and every adapter; an adapter's `parent` is the base."""
    base = serving.settings.base_name
    named = serving.registry.names()
    adapters = [_card(name, created.timestamp(), base) for name, created in named]
    # Made here, in a thread: with thousands of adapters it takes tens of milliseconds.
    return JSONResponse({"object": "list", "data": [_base(serving), *adapters]})


@router.get("/{name:path}")
async def one(name: str, serving: Served) -> Json:
    """The base, or the adapter that a reference means."""
    if name in (serving.settings.base_name, "base"):
        return _base(serving)
    try:
        version = await run_sync(serving.registry.resolve, name)
    except InvalidReference:
        raise AdapterNotFound(f"There is no model or adapter {name!r}.", "model") from None
    return _card(name, version.created.timestamp(), serving.settings.base_name)


def _base(serving: Serving) -> Json:
    name = serving.settings.base_name
    return _card(name, serving.started, parent=None)


def _card(name: str, created: float, parent: str | None) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": "loraplex",
        "parent": parent,
    }
