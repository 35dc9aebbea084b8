"""The composition root: builds the parts of a server and puts the HTTP app together."""

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from adapters.base import BaseSpec
from adapters.demo import WEIGHTS
from adapters.ingest import Ingest
from adapters.registry import Registry
from adapters.sources import directory
from adapters.sources.intake import Transfer
from adapters.store import Store
from server.config import DEFAULT_MODEL, Settings
from server.engine import launch
from server.engine.handlers import Handlers
from server.gateway import Gateway
from server.routes import Serving, adapters, failure, models, openai, ops

Start = Callable[[], Any]
ENGINE_GRACE_S = 1.0  # until an engine that does not end by itself is killed


def build(settings: Settings, folder: Path) -> Serving:
    """Everything but the engine, for a base model in `folder`; brings the demo adapters in.

    Raises:
        AdapterError: the base cannot be understood, or the state folder not be used.
    """
    base = BaseSpec.read(folder, settings.base_name)
    store = Store(settings.home / "store")
    registry = Registry(f"sqlite:///{settings.home / 'registry.db'}")
    store.sweep(registry.digests())
    reserved = {"base", settings.base_name}
    ingest = Ingest(store, registry, base, settings.max_lora_rank, reserved)
    serving = Serving(settings, base, store, registry, ingest)
    if settings.demo_adapters and settings.model == DEFAULT_MODEL:
        _offer_demos(serving)
    return serving


def _offer_demos(serving: Serving) -> None:
    """The demo adapters, each once: one that somebody deleted or replaced stays as it is."""
    for folder in sorted(WEIGHTS.iterdir()):
        if serving.registry.knows(folder.name):
            continue
        with serving.store.staging() as staged:
            directory.copy(folder, staged, Transfer(serving.settings.max_upload_mb * 10**6))
            serving.ingest.ingest(staged, folder.name, "demo")


def create_app(
    serving: Serving, args: Namespace, start: Start, done: Callable[[Exception | None], None]
) -> FastAPI:
    """The HTTP app. It answers at once; inference and /ready do when `start` has returned.

    `start` gives a running engine and is called in a thread; `args` are vLLM's parsed arguments,
    for its handlers. `done` is called when the engine can answer, or with what kept it from it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(_start(serving, args, start, done))
        yield
        starting.cancel()
        if serving.gateway is not None:
            await asyncio.to_thread(serving.gateway.shutdown, timeout=ENGINE_GRACE_S)
        serving.registry.close()

    app = FastAPI(
        title="Loraplex",
        summary="One base model, any number of LoRA adapters, one server.",
        lifespan=lifespan,
    )
    app.state.serving = serving
    failure.install(app)
    for routes in (openai, models, adapters, ops):
        app.include_router(routes.router)
    return app


async def _start(
    serving: Serving, args: Namespace, start: Start, done: Callable[[Exception | None], None]
) -> None:
    try:
        engine = await asyncio.to_thread(start)
        serving.remarks = await launch.verify(engine)
        gateway = Gateway(
            engine,
            serving.registry,
            serving.store.path,
            serving.ingest.collect,
            (serving.settings.base_name, "base"),
            serving.settings.host_capacity,
        )
        serving.handlers = await Handlers.build(gateway, args)
        serving.gateway = gateway
    except Exception as error:
        done(error)
    else:
        done(None)
