"""The engine client that vLLM's handlers talk to: everything that is Loraplex about a request.

For every endpoint, once: resolve the reference, make the version resident, hold the lease, stream,
release. What may be served comes from the registry; what the engine holds is derived from it.
"""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from adapters.effect import Effect
from adapters.errors import AdapterError, AdapterNotFound, InvalidAdapter, InvalidReference, Problem
from adapters.ingest import Ingest
from adapters.names import Reference
from adapters.registry import Registry, Version
from server.engine.call import Call, LoRARequest, current
from server.engine.proof import Prover
from server.errors import AdapterConflict, AdapterLoadFailed, EngineNotReady
from server.residency import Entry, Load, Residency

PROOF_TIMEOUT_S = 300  # an engine so busy that a new adapter gets no turn in this time


class Gateway:
    """An engine client over vLLM's own; whatever it does not define is vLLM's.

    In the engine a version goes by its digest as its name, and by an integer id that is given once
    and never again: equal names mean equal bytes, in vLLM's prefix cache as well.
    """

    def __init__(
        self,
        engine: Any,
        registry: Registry,
        ingest: Ingest,
        base_names: tuple[str, ...],
        capacity: int,
    ) -> None:
        """`capacity` is the size of the host cache, in versions."""
        self._engine = engine
        self._registry = registry
        self._ingest = ingest
        self._prover = Prover(engine)
        self._proofs = asyncio.Semaphore(1)
        self.base_names = base_names
        self.residency = Residency(capacity)
        self._numbers = itertools.count(1)
        self._ids: dict[str, int] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._changed: asyncio.Future[None] | None = None
        self._retiring: set[str] = set()
        self._waiting: Counter[str] = Counter()  # requests that no place is free for
        self._tasks: set[asyncio.Task[None]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def check(self) -> None:
        """Raises EngineNotReady if the engine has ended."""
        if self._engine.errored:
            raise EngineNotReady("The engine has ended; the server must be restarted.")

    async def open(self, adapter: str | None, model: str | None) -> Call:
        """Decides what a request runs on, for itself and for vLLM's handlers after it.

        Raises:
            AdapterConflict: `adapter` and `model` name different adapters.
            AdapterNotFound, VersionNotFound, AliasNotFound: there is no such thing to serve.
            InvalidReference: `adapter` is no reference.
            EngineNotReady: the engine has ended.
        """
        self.check()
        if adapter and model and model not in (*self.base_names, adapter):
            raise AdapterConflict(
                f"adapter {adapter!r} and model {model!r} name different adapters: name one of "
                "them, or the base as the model.",
                param="adapter",
            )
        asked = adapter or model or self.base_names[0]
        call = Call(asked)
        if asked not in self.base_names:
            call.version = await self.resolve(asked, "adapter" if adapter else "model")
            call.lora = self._request(call.version)
        current.set(call)
        return call

    async def generate(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        **options: Any,
    ) -> AsyncGenerator[Any, None]:
        """vLLM's generate, with the adapter resident from before the first step to the last."""
        stream = self._engine.generate(
            prompt, sampling_params, request_id, lora_request=lora_request, **options
        )
        async with self._resident(lora_request), aclosing(stream):
            async for output in stream:
                yield output

    async def encode(
        self,
        prompt: Any,
        pooling_params: Any,
        request_id: str,
        lora_request: LoRARequest | None = None,
        **options: Any,
    ) -> AsyncGenerator[Any, None]:
        """vLLM's encode, likewise."""
        stream = self._engine.encode(
            prompt, pooling_params, request_id, lora_request=lora_request, **options
        )
        async with self._resident(lora_request), aclosing(stream):
            async for output in stream:
                yield output

    def retire(self, digests: list[str]) -> None:
        """Unloads and removes versions that the registry has let go, each with its last lease."""
        for digest in digests:
            self._retiring.add(digest)
            self._finish_retiring(digest)

    async def prove(self, digest: str, folder: Path) -> Effect:
        """What the adapter in `folder`, which is not sealed yet, does to the base's next tokens.

        One at a time. Raises InvalidAdapter if the engine cannot load it, EngineNotReady.
        """
        self.check()
        lora = LoRARequest(digest, self._id(digest), str(folder))
        effect = None
        try:
            async with asyncio.timeout(PROOF_TIMEOUT_S), self._proofs, self._resident(lora):
                effect = await self._prover.measure(lora)
        except AdapterLoadFailed as error:
            self.check()
            raise InvalidAdapter([_not_loaded(error)]) from error
        except TimeoutError:
            raise EngineNotReady("The engine is too busy to try the adapter out.") from None
        except Exception as error:
            self.check()
            raise EngineNotReady("The engine could not try the adapter out.") from error
        finally:
            if effect is None or effect.problems() or not effect.difference:
                self.retire([digest])
        return effect

    async def resolve(self, asked: str, param: str) -> Version:
        """The version that the reference `asked` means; errors are about the field `param`.

        Raises:
            AdapterNotFound, VersionNotFound, AliasNotFound: there is no such thing to serve.
            InvalidReference: `asked` is no reference, and `param` says that it must be one.
        """
        try:
            reference = Reference.parse(asked)
        except InvalidReference as error:
            if param == "adapter":
                error.param = param
                raise
            # Other servers' model names are no references of ours, just models we do not have.
            raise AdapterNotFound(
                f"There is no model or adapter {asked!r}. GET /v1/models lists them.", param=param
            ) from None
        try:
            return await asyncio.to_thread(self._registry.resolve, reference)
        except AdapterNotFound as error:
            error.param = param
            raise

    def _request(self, version: Version) -> LoRARequest:
        digest = version.digest
        return LoRARequest(digest, self._id(digest), str(self._ingest.form(digest)))

    def _id(self, digest: str) -> int:
        if digest not in self._ids:
            self._ids[digest] = next(self._numbers)
        return self._ids[digest]

    @asynccontextmanager
    async def _resident(self, lora: LoRARequest | None) -> AsyncIterator[None]:
        """Inside, `lora` is loaded and cannot be evicted. What ends a call is noted on it."""
        call = current.get(Call(""))
        try:
            if lora is None:
                yield
                return
            entry = await self._lease(lora, call)
            try:
                yield
            finally:
                self._release(entry)
        except Exception as error:
            call.error = error
            raise

    async def _lease(self, lora: LoRARequest, call: Call) -> Entry:
        digest = lora.lora_name
        asked = time.monotonic()
        with self._waits(digest):
            while (granted := self.residency.lease(digest)) is None:
                await self._change()
        entry, load = granted
        placed = time.monotonic()
        if load is not None:
            self._loads[digest] = self._spawn(self._load(lora, load))
        try:
            if digest in self._loads:
                # Others may wait for this load too: it goes on when this request is given up.
                await asyncio.shield(self._loads[digest])
        except asyncio.CancelledError:
            self._release(entry)
            raise
        call.queue_ms = (placed - asked) * 1000
        call.load_ms = (time.monotonic() - placed) * 1000
        return entry

    @contextmanager
    def _waits(self, digest: str) -> Iterator[None]:
        """Inside, the bytes of `digest` stay, as they do for a lease."""
        self._waiting[digest] += 1
        try:
            yield
        finally:
            self._waiting -= Counter([digest])  # and forget those that nobody waits for
            if digest in self._retiring:
                self._finish_retiring(digest)

    async def _load(self, lora: LoRARequest, load: Load) -> None:
        try:
            if load.evict is not None:
                await self._engine.remove_lora(self._ids[load.evict])
            if lora.lora_path == str(self._ingest.form(load.digest)):
                await asyncio.to_thread(self._ingest.vouch, load.digest)
            await self._engine.add_lora(lora)
        except Exception as error:
            self.residency.failed(load.digest)
            if isinstance(error, AdapterError):
                raise
            raise AdapterLoadFailed(
                f"The adapter {load.digest} could not be loaded into the engine: {error}"
            ) from error
        else:
            self.residency.loaded(load.digest)
        finally:
            del self._loads[load.digest]
            self._wake()

    async def _change(self) -> None:
        """Waits until a place in the host cache may be free."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)

    def _release(self, entry: Entry) -> None:
        self.residency.release(entry)
        if entry.digest in self._retiring:
            self._finish_retiring(entry.digest)
        self._wake()

    def _wake(self) -> None:
        # Everybody who waits looks again, in the order they came.
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None

    def _finish_retiring(self, digest: str) -> None:
        if self.residency.leases(digest) == 0 and not self._waiting[digest]:
            self._retiring.discard(digest)
            self._spawn(self._remove(digest, unload=self.residency.drop(digest)))

    async def _remove(self, digest: str, *, unload: bool) -> None:
        try:
            if unload:
                await self._engine.remove_lora(self._ids[digest])
        finally:
            await asyncio.to_thread(self._ingest.collect, digest)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)  # the loop keeps only a weak reference
        task.add_done_callback(self._tasks.discard)
        return task


def _not_loaded(error: AdapterLoadFailed) -> Problem:
    fix = "Save the adapter again; if it loads elsewhere, report this as a fault of the checks."
    return Problem("engine_refused", "engine", error.message, fix)


class Proving:
    """`Gateway.prove` for adapters that arrive before the engine is there: they wait for it."""

    def __init__(self) -> None:
        self._gateway: Gateway | None = None
        self._decided = asyncio.Event()

    async def __call__(self, digest: str, folder: Path) -> Effect:
        """Raises what `Gateway.prove` does, and EngineNotReady if no engine came."""
        await self._decided.wait()
        if self._gateway is None:
            raise EngineNotReady("The engine did not start.")
        return await self._gateway.prove(digest, folder)

    def begin(self, gateway: Gateway) -> None:
        """The engine can answer."""
        self._gateway = gateway
        self._decided.set()

    def give_up(self) -> None:
        """No engine will come."""
        self._decided.set()
