"""HTTP: one module a part of the interface."""

import time
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from anyio.to_thread import run_sync
from fastapi import Depends, Request

from adapters.base import BaseSpec
from adapters.ingest import Ingest
from adapters.registry import Registry
from adapters.store import Store
from server.config import Settings
from server.engine.handlers import Handlers
from server.errors import EngineNotReady
from server.gateway import Gateway, Proving
from server.imports import Imports
from server.keys import Keys
from server.metrics import Collector
from server.quotas import Quotas
from server.recent import Recent
from server.traffic import Traffic
from server.usage import Usage

ENDING = "This server is ending. Ask another, or again in a moment."


@dataclass
class Serving:
    """The parts of a server that routes use; `gateway` and `handlers` come when the engine does.

    `args` are vLLM's.
    """

    settings: Settings
    args: Namespace
    base: BaseSpec
    store: Store
    registry: Registry
    keys: Keys
    usage: Usage
    ingest: Ingest
    imports: Imports
    proving: Proving
    gateway: Gateway | None = None
    handlers: Handlers | None = None
    quotas: Quotas = field(default_factory=Quotas)
    recent: Recent = field(default_factory=Recent)
    started: float = field(default_factory=time.time)
    restarts: int = 0  # engines after the first
    remarks: list[str] = field(default_factory=list)  # what to know about how the engine runs
    under_way: int = 0  # HTTP requests
    ending: bool = False  # no new work is taken

    def __post_init__(self) -> None:
        self.traffic = Traffic(self.settings.metrics_adapters)
        self.metrics = Collector(
            lambda: self.gateway, lambda: self.restarts, self.traffic, self.registry
        )

    def ready(self) -> tuple[Gateway, Handlers]:
        """The gateway and vLLM's handlers over it.

        Raises:
            EngineNotReady: the engine is starting.
        """
        if self.gateway is None or self.handlers is None:
            raise EngineNotReady("The engine is starting; GET /ready says when it can answer.")
        return self.gateway, self.handlers

    async def settle_pins(self) -> None:
        """Lets what no version is pinned for be evicted again; equal bytes have one place."""
        kept = {version.digest for version in await run_sync(self.registry.pinned)}
        if self.gateway is not None:
            self.gateway.residency.pin_only(kept)

    async def let_go(self, digests: list[str]) -> None:
        """Removes versions that the registry has let go, each with its last lease, and pins."""
        if self.gateway is not None:
            self.gateway.retire(digests)
            await self.settle_pins()
            return
        for digest in digests:  # no engine yet, so nobody uses them
            self.ingest.collect(digest)


def _serving(request: Request) -> Serving:
    return cast(Serving, request.app.state.serving)


Served = Annotated[Serving, Depends(_serving)]
Json = dict[str, Any]
