"""What can be asked for, as OpenAI lists models."""

from anyio.to_thread import run_sync
from fastapi import APIRouter
from fastapi.responses import JSONResponse

from adapters.errors import AdapterNotFound, InvalidReference, no_adapter
from adapters.names import Reference
from server.keys import BASE
from server.routes import Json, Served, Serving
from server.routes.access import Asker

router = APIRouter(prefix="/v1/models", tags=["inference"])


@router.get("")
def every(serving: Served, asker: Asker) -> JSONResponse:
    """The base and every adapter that the key may use; an adapter's `parent` is the base."""
    base = serving.settings.base_name
    cards = [_base(serving)] if asker.sees(BASE) else []
    named = serving.registry.names(asker.patterns)
    cards += [_card(name, created.timestamp(), base) for name, created in named]
    # Made here, in a thread: with thousands of adapters it takes tens of milliseconds.
    return JSONResponse({"object": "list", "data": cards})


@router.get("/{name:path}")
async def one(name: str, serving: Served, asker: Asker) -> Json:
    """The base, or the adapter that a reference means."""
    if name in (serving.settings.base_name, BASE) and asker.sees(BASE):
        return _base(serving)
    try:
        reference = Reference.parse(name)
    except InvalidReference:
        raise AdapterNotFound(f"There is no model or adapter {name!r}.", "model") from None
    if not asker.sees(reference.name):
        raise no_adapter(reference.name)
    version = await run_sync(serving.registry.resolve, reference)
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
