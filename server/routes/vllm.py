"""vLLM's own two calls, for tools that make them: they import and delete adapters."""

from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from adapters.errors import no_adapter
from server.routes import Served
from server.routes.access import Asker
from server.routes.adapters import may_bring

router = APIRouter(prefix="/v1", tags=["adapters"])


class LoadRequest(BaseModel):
    """vLLM's LoadLoRAAdapterRequest; what it says beyond name and path has no meaning here."""

    model_config = ConfigDict(extra="ignore")

    lora_name: str = Field(description="Name of the adapter.")
    lora_path: str = Field(
        description="A folder, or org/name on the hub, within what --import-from allows."
    )


class UnloadRequest(BaseModel):
    """vLLM's UnloadLoRAAdapterRequest."""

    model_config = ConfigDict(extra="ignore")

    lora_name: str = Field(description="Name of the adapter.")


@router.post("/load_lora_adapter", response_class=PlainTextResponse)
async def load(asked: LoadRequest, serving: Served, asker: Asker) -> PlainTextResponse:
    """Imports an adapter, as POST /v1/adapters does: it stays, also after a restart."""
    scheme = "file" if asked.lora_path.startswith("/") else "hf"
    may_bring(asker, asked.lora_name)
    source = f"{scheme}://{asked.lora_path}"
    one = serving.imports.begin(asked.lora_name, source, owner=asker.owner)
    await serving.imports.end(one)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


@router.post("/unload_lora_adapter", response_class=PlainTextResponse)
async def unload(asked: UnloadRequest, serving: Served, asker: Asker) -> PlainTextResponse:
    """Deletes an adapter with all its versions, as DELETE /v1/adapters/{name} does."""
    if not asker.sees(asked.lora_name):
        raise no_adapter(asked.lora_name)
    digests: Any = await run_sync(serving.registry.delete_adapter, asked.lora_name)
    await serving.let_go(digests)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")
