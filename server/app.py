"""The composition root: builds the parts of a server and puts the HTTP app together."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from adapters.base import BaseSpec
from adapters.database import Database
from adapters.demo import WEIGHTS
from adapters.errors import AdapterError
from adapters.ingest import Ingest
from adapters.registry import Registry
from adapters.sources.address import Allowed
from adapters.store import Store
from server.config import DEFAULT_MODEL, Settings
from server.engine import launch
from server.gateway import Proving
from server.imports import Imports, rules
from server.keys import Keys
from server.routes import (
    ENDING,
    Serving,
    adapters,
    console,
    failure,
    keys,
    live,
    models,
    openai,
    openapi,
    ops,
    usage,
    vllm,
)
from server.routes.access import Guard
from server.routes.journal import Journal
from server.supervisor import Say, Start, Supervisor
from server.usage import FLUSH_S, Usage
from server.watch import Watch

FAREWELL_S = 3.0  # that requests have to tell their clients that they were ended
POLL_S = 0.05
PARTS = (openai, models, adapters, vllm, keys, usage, live, ops, console)


def build(settings: Settings, folder: Path) -> Serving:
    """Everything but the engine, for a base model in `folder`.

    Raises:
        AdapterError: the base cannot be understood, or the state folder not be used.
        ConfigError: a setting that vLLM does not take.
    """
    base = BaseSpec.read(folder, settings.base_name)
    linears = sorted({path.rpartition(".")[2] for path in base.linears} - {"lm_head"})
    args = launch.parse(settings, folder, linears)
    store = Store(settings.home / "store")
    store.sweep()
    database = Database.of(settings.home)
    registry = Registry(database)
    proving = Proving()
    ingest = Ingest(store, registry, base, rules(settings, launch.dtype(args, folder)))
    imports = Imports(
        store,
        ingest,
        Allowed(settings.import_from),
        proving,
        max_bytes=settings.max_upload_bytes,
        timeout_s=settings.import_timeout,
        allow_pickle=settings.allow_pickle,
    )
    return Serving(
        settings,
        args,
        base,
        store,
        registry,
        Keys(database, settings.admin_token),
        Usage(database),
        ingest,
        imports,
        proving,
    )


def create_app(
    serving: Serving, start: Start, done: Callable[[Exception | None], None], say: Say = print
) -> FastAPI:
    """The HTTP app. It answers at once; inference and /ready do when `start` has returned.

    `start` gives a running engine and is called in a thread. `done` is called when the engine can
    answer, or with what kept it from it; `say` gets what an operator should know afterwards.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        supervisor = Supervisor(serving, start, say)
        running = asyncio.create_task(_run(serving, supervisor, done, say))
        books = asyncio.create_task(_keep_books(serving, say))
        yield
        running.cancel()
        books.cancel()
        serving.proving.give_up()
        serving.imports.stop()
        await asyncio.wait([running, books])
        await supervisor.stop()
        await _write_books(serving, say)
        serving.registry.close()

    app = FastAPI(
        title="Loraplex",
        summary="One base model, any number of LoRA adapters, one server.",
        lifespan=lifespan,
    )
    app.state.serving = serving
    failure.install(app)
    for part in PARTS:
        app.include_router(part.router)
    openapi.document(app)
    app.add_middleware(Guard, serving=serving)
    app.add_middleware(Journal, serving=serving)  # around the guard: what it refuses is noted too
    return app


async def drain(serving: Serving) -> None:
    """Takes no new work, and returns when what runs has ended; after the grace it is ended."""
    serving.ending = True
    if await _idle(serving, serving.settings.shutdown_grace):
        return
    serving.proving.give_up()
    serving.imports.stop()
    if serving.gateway is not None:
        serving.gateway.close(ENDING)
    await _idle(serving, FAREWELL_S)


async def _idle(serving: Serving, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while serving.under_way and time.monotonic() < deadline:  # noqa: ASYNC110 (a plain count)
        await asyncio.sleep(POLL_S)
    return not serving.under_way


async def _keep_books(serving: Serving, say: Say) -> None:
    while True:
        await asyncio.sleep(FLUSH_S)
        await _write_books(serving, say)


async def _write_books(serving: Serving, say: Say) -> None:
    try:
        await asyncio.to_thread(serving.usage.flush)
    except AdapterError as error:
        say(f"what was used is not written yet: {error.message}")


async def _run(
    serving: Serving,
    supervisor: Supervisor,
    done: Callable[[Exception | None], None],
    say: Say,
) -> None:
    try:
        handlers = await supervisor.begin()
        await _offer_demos(serving, say)
        await supervisor.pin()
        serving.handlers = handlers  # from here on the server is ready
    except Exception as error:
        serving.proving.give_up()
        done(error)
        return
    done(None)
    await asyncio.gather(_audit(serving, say), _watch(serving, say), supervisor.keep())


async def _offer_demos(serving: Serving, say: Say) -> None:
    """The demo adapters, each once: one that somebody deleted or replaced stays as it is."""
    if not serving.settings.demo_adapters or serving.settings.model != DEFAULT_MODEL:
        return
    for folder in sorted(WEIGHTS.iterdir()):
        if serving.registry.knows(folder.name):
            continue
        try:
            with serving.store.staging() as staged:
                await asyncio.to_thread(serving.imports.copy, folder, staged)
                await serving.imports.ingest(staged, folder.name, "demo")
        except AdapterError as error:
            say(f"the demo adapter {folder.name} is not served: {error.message}")


async def _audit(serving: Serving, say: Say) -> None:
    """Holds store and registry against each other, while the server answers already."""
    try:
        audit = await serving.imports.check(serving.ingest.audit)
    except AdapterError as error:
        say(f"the store could not be checked: {error.message}")
        return
    for digest, reason in audit.damaged.items():
        names = ", ".join(serving.registry.references_to(digest))
        say(f"not served any more: {names}: {reason} Upload the same files again to mend it.")
    await serving.let_go(audit.orphans)


async def _watch(serving: Serving, say: Say) -> None:
    if (root := serving.settings.watch) is not None:
        parts = (serving.store, serving.registry, serving.imports, serving.let_go, say)
        await Watch(root, *parts).run()
