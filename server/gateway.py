"""The engine client that vLLM's handlers talk to: everything that is Loraplex about a request.

For every endpoint, once: resolve the reference, wait for its turn, have the version resident, hold
the lease, stream, count tokens, release. What may be served comes from the registry; what the
engine holds is derived from it. Who runs next is `admission`'s to say and what is loaded
`residency`'s: both decide, and `_decide` here does what they say.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adapters.effect import Effect
from adapters.errors import (
    AdapterError,
    AdapterNotFound,
    InvalidAdapter,
    InvalidReference,
    Problem,
    no_adapter,
)
from adapters.ingest import Ingest
from adapters.names import Reference
from adapters.registry import Registry, Version
from server.admission import Admission, Ticket
from server.engine import launch
from server.engine.call import Call, LoRARequest, current
from server.engine.loading import Loader, LoadFailed
from server.engine.meter import Meter, first_token_age, most_tokens, produced, prompt_tokens
from server.engine.proof import PROMPTS, Prover
from server.errors import (
    AdapterConflict,
    AdapterInUse,
    AdapterLoadFailed,
    AdapterLoadTimeout,
    EngineNotReady,
    Overloaded,
    ServerError,
    TooManyPinned,
)
from server.keys import ANYBODY, BASE, Key
from server.recent import Recent
from server.residency import Entry, Load, Residency, State, Swap

T = TypeVar("T")

PROOF_TIMEOUT_S = 300  # an engine so busy that a new adapter gets no turn in this time
PROOFS = "(proofs)"  # whose share proofs use: no adapter can be called that
LOADING = 2  # adapters that are loaded at once
ENDED = "The engine has ended and is being started again. Ask again in a moment."
SAVE_AGAIN = "Save the adapter again; if it {} elsewhere, report this as a fault of the checks."
IDLE_S = 1.0  # without work, until what the engine has is compared with what it should have
WATCH_S = 0.2  # between two looks at whether the engine has ended
ASKED = 4  # times that a busy engine is asked for a sign in the time that it may be silent
# Between two looks at the tokens of those that run, while somebody waits. A look takes the core of
# a thread that computes, and the others wait for it; what is streamed we are told of anyway.
TICK_S = 0.05


@dataclass(frozen=True)
class Times:
    """Seconds: that a request may wait, that a load may take, that the engine may be silent."""

    queue: float = 600
    load: float = 60
    silence: float = 120


@dataclass(eq=False)
class _Turn:
    """What the gateway knows of a request besides its ticket."""

    lora: LoRARequest | None
    request_id: str | None
    granted: asyncio.Future[None]
    entry: Entry | None = None
    swap: asyncio.Task[Exception | None] | None = None
    load: tuple[float, float] | None = None  # when the one that it waited for began and ended

    def refuse(self, error: Exception) -> None:
        """Ends the wait with `error`, unless it has ended."""
        if not self.granted.done():
            self.granted.set_exception(error)


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
        admission: Admission,
        residency: Residency,
        times: Times,
        numbers: "itertools.count[int]",
        key_weights: dict[str, float],
        recent: Recent,
    ) -> None:
        """`numbers` gives the ids, of all engines of this process; the first base name is its own.

        `admission` and `residency` are new, and know each other. `admission` looks into
        `key_weights` for the shares of keys.
        """
        self._engine = engine
        self._registry = registry
        self._ingest = ingest
        self._loader = Loader(engine)
        self._prover = Prover(engine)
        self._proofs = asyncio.Semaphore(1)
        self.base_names = base_names
        self.admission = admission
        self.residency = residency
        self.times = times
        self.key_weights = key_weights
        self._recent = recent
        self.drift: list[str] = []  # see `_compare`; the last time that the engine was idle
        self._worked = 0  # turns and tasks so far: what the engine has may have changed
        self.refused = 0  # requests, for waiting too long or among too many
        self._numbers = numbers
        self._ids: dict[str, int] = {}
        self._turns: dict[Ticket, _Turn] = {}
        self._loads: dict[str, asyncio.Task[Exception | None]] = {}
        self._swaps: dict[str, asyncio.Task[Exception | None]] = {}
        self._retiring: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ticking: asyncio.Task[None] | None = None
        self._metered = 0.0
        # Of its own: a disk that hangs must not take the threads that others need.
        self._readers = ThreadPoolExecutor(LOADING, "vouch")
        self._suspects: frozenset[str] | None = None
        self._reason = ENDED

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def check(self) -> None:
        """Raises EngineNotReady if the engine has ended."""
        if self._suspects is not None or self._engine.errored:
            raise EngineNotReady(self._reason)

    async def open(self, adapter: str | None, model: str | None, key: Key = ANYBODY) -> Call:
        """Decides what a request of `key` runs on, for itself and for vLLM's handlers after it.

        Raises:
            AdapterConflict: `adapter` and `model` name different adapters.
            AdapterNotFound, VersionNotFound, AliasNotFound: there is no such thing to serve, or
                not to this key.
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
        param = "adapter" if adapter else "model"
        call = Call(asked, key)
        if asked not in self.base_names:
            call.version = await self.resolve(asked, param, key)
            call.lora = self._request(call.version)
        elif not key.sees(BASE):
            raise _no_model(asked, param)
        if key.weight != 1.0 or key.id in self.key_weights:
            self.key_weights[key.id] = key.weight
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
        """vLLM's generate, when it is its turn, with the adapter in a slot from first to last."""
        size = prompt_tokens(prompt)
        most = most_tokens(sampling_params, self._engine, size)
        ticket = self._ticket(lora_request, size, most, sampling_params.n or 1)
        meter, call = Meter(sampling_params), current.get(Call(""))
        stream = self._engine.generate(
            prompt, sampling_params, request_id, lora_request=lora_request, **options
        )
        async with self._turn(ticket, lora_request, request_id), aclosing(stream):
            call.prompt_tokens += size
            last = None
            async for output in stream:
                before = meter.tokens
                self._progress(ticket, meter.add(output))
                if came := meter.tokens - before:
                    call.output_tokens += came
                    noted = len(call.gaps)
                    last = _note_times(call, meter, output, last)
                    self._recent.came(ticket.adapter, came, call.gaps[noted:])
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
        ticket = self._ticket(lora_request, prompt_tokens(prompt), 1)
        stream = self._engine.encode(
            prompt, pooling_params, request_id, lora_request=lora_request, **options
        )
        async with self._turn(ticket, lora_request), aclosing(stream):
            async for output in stream:
                yield output

    async def prove(self, digest: str, folder: Path) -> Effect:
        """What the adapter in `folder`, which is not sealed yet, does to the base's next tokens.

        One at a time. Raises InvalidAdapter if the engine cannot load it, EngineNotReady,
        Overloaded.
        """
        self.check()
        lora = LoRARequest(digest, self._id(digest), str(folder))
        ticket = Ticket(PROOFS, digest, sum(map(prompt_tokens, PROMPTS)), most=1)
        effect = None
        try:
            async with (
                asyncio.timeout(PROOF_TIMEOUT_S),
                self._proofs,
                self._turn(ticket, lora),
            ):
                effect = await self._prover.measure(lora)
        except AdapterLoadFailed as error:
            self.check()
            raise InvalidAdapter([_not_loaded(error)]) from error
        except TimeoutError:
            raise EngineNotReady("The engine is too busy to try the adapter out.") from None
        except ServerError:
            raise
        except Exception as error:
            self.check()
            raise EngineNotReady("The engine could not try the adapter out.") from error
        finally:
            if effect is None or effect.problems() or not effect.difference:
                self.retire([digest])
        return effect

    async def resolve(self, asked: str, param: str, key: Key = ANYBODY) -> Version:
        """The version that the reference `asked` means; errors are about the field `param`.

        Raises:
            AdapterNotFound, VersionNotFound, AliasNotFound: there is no such thing to serve, or
                not to `key`.
            InvalidReference: `asked` is no reference, and `param` says that it must be one.
        """
        try:
            reference = Reference.parse(asked)
        except InvalidReference as error:
            if param == "adapter":
                error.param = param
                raise
            # Other servers' model names are no references of ours, just models we do not have.
            raise _no_model(asked, param) from None
        if not key.sees(reference.name):
            raise no_adapter(reference.name, param)
        try:
            return await asyncio.to_thread(self._registry.resolve, reference)
        except AdapterNotFound as error:
            error.param = param
            raise

    # -- residency by hand --------------------------------------------------------------------

    async def load(self, version: Version) -> None:
        """Has `version` on the host; what requests wait for goes first.

        Raises AdapterLoadFailed, AdapterError, EngineNotReady, and Overloaded if there is no place.
        """
        self.check()
        digest = version.digest
        if self.residency.standing(digest) is None and (
            len(self._loads) >= LOADING
            or not self._begin(self._request(version), self.admission.waits)
        ):
            raise Overloaded("Other adapters are being loaded, or all places are in use.")
        if (task := self._loads.get(digest)) is not None:
            await _done(task)

    def unload(self, version: Version) -> None:
        """Takes `version` out of the engine. Raises AdapterInUse."""
        digest = version.digest
        if version.pinned:
            raise AdapterInUse(f"{version.reference} is pinned. Unpin it first.")
        if self.residency.is_pinned(digest):
            raise AdapterInUse(
                f"{version.reference} has the same bytes as another version, which is pinned: they "
                "stay loaded."
            )
        if self.admission.has(digest) or digest in self._loads:
            raise AdapterInUse(f"Requests use {version.reference}. Ask again when they have ended.")
        if self.residency.drop(digest):
            self._recent.event("unloaded", digest)
            self._spawn(self._drop(digest))

    async def pin(self, version: Version) -> None:
        """Loads `version`, and keeps it loaded. Raises what `load` raises, and TooManyPinned."""
        await self.load(version)
        if not self.residency.pin(version.digest):
            places = self.residency.places - self.residency.slots
            raise TooManyPinned(
                f"{places} adapters can be pinned: as many as the host cache holds beyond the "
                "slots. Unpin one, or start the server with a larger --max-cpu-loras."
            )

    # -- the end ------------------------------------------------------------------------------

    def retire(self, digests: list[str]) -> None:
        """Unloads and removes versions that the registry has let go, each with its last request."""
        for digest in digests:
            self._retiring.add(digest)
            self._finish_retiring(digest)

    async def ended(self) -> str:
        """Returns when the engine has ended or hangs, with what to say of it."""
        asked, compared = time.monotonic(), self._worked
        while not self._engine.errored:
            await asyncio.sleep(WATCH_S)
            now, idle = time.monotonic(), not self.admission.busy and not self._tasks
            if now - asked < (IDLE_S if idle else self.times.silence / ASKED):
                continue
            asked, worked = now, self._worked
            if idle and compared == worked:
                continue
            try:
                # The engine answers between two steps.
                async with asyncio.timeout(self.times.silence):
                    there = await self._unless_dead(self._loader.resident())
                if idle and self._worked == worked and there is not None:
                    self.drift, compared = self._compare(there), worked
            except TimeoutError:
                return f"the engine has made no step for {self.times.silence:.0f} s"
            except Exception as error:
                if not self._engine.errored:
                    return f"the engine is not what it should be: {error}"
        return "the engine has ended"

    async def _unless_dead(self, answer: Awaitable[T]) -> T | None:
        """`answer`, or None once the engine has ended: what is asked of a dead one stays open."""
        task = asyncio.ensure_future(answer)
        try:
            while not task.done() and not self._engine.errored:
                await asyncio.wait([task], timeout=WATCH_S)
            return task.result() if task.done() else None
        finally:
            task.cancel()

    def close(self, reason: str = ENDED) -> frozenset[str]:
        """Ends all requests with EngineNotReady; returns the digests that were in the engine."""
        suspects, self._reason = self._note_end(), reason
        for turn in self._turns.values():
            turn.refuse(EngineNotReady(reason))
        launch.release(self._engine)
        for task in (*self._tasks, *([self._ticking] if self._ticking else [])):
            task.cancel()
        self._readers.shutdown(wait=False, cancel_futures=True)
        return suspects

    def _compare(self, there: dict[str, Any]) -> list[str]:
        """What the workers have that residency does not say, or the other way round."""
        host = {self._ids[entry.digest] for entry in self.residency.entries()}
        slots = {self._ids[digest] for digest in self.residency.in_slots()}
        in_slots = {each for each in there["slots"] if each is not None}
        found = [f"on the host: {each}" for each in host ^ {*there["host"], *there["reading"]}]
        found += [f"in a slot: {each}" for each in slots ^ in_slots]
        return found + [f"unasked: {there['unasked']}"] * bool(there["unasked"])

    def is_adapter(self, name: str) -> bool:
        """Whether a name of admission's counts is an adapter's: not the base's, nor of proofs."""
        return name not in self.base_names and name != PROOFS

    def left_behind(self) -> list[str]:
        """What would be wrong to find when no request is under way: nothing, or what it is."""
        found = [f"ticket {ticket}" for ticket in self._turns]
        found += [f"waiting or running: {name}" for name in self.admission.counts()]
        found += [f"leases on {e.digest}" for e in self.residency.entries() if e.leases]
        found += [f"loading {digest}" for digest in self._loads]
        found += [f"into a slot: {digest}" for digest in self._swaps]
        return found + [f"admission: {what}" for what in self.admission.left_behind()]

    def under_way(self) -> int:
        """Requests that wait or run, and loads, swaps and removals that are not done."""
        return len(self._turns) + len(self._tasks)

    # -- a request's turn ---------------------------------------------------------------------

    def _ticket(self, lora: LoRARequest | None, prompt: int, most: int, seats: int = 1) -> Ticket:
        call = current.get(Call(""))
        adapter = call.adapter or self.base_names[0]
        return Ticket(adapter, lora.lora_name if lora else None, prompt, most, call.key.id, seats)

    @asynccontextmanager
    async def _turn(
        self, ticket: Ticket, lora: LoRARequest | None, request_id: str | None = None
    ) -> AsyncIterator[None]:
        """Inside, it is the ticket's turn, and `lora` is in a slot. What ends a call is noted."""
        call = current.get(Call(""))
        try:
            self.check()
            await self._wait(ticket, lora, request_id, call)
            granted = time.monotonic()
            try:
                yield
            except Exception as error:
                if self._suspects is not None or self._engine.errored:
                    self._note_end()
                    raise EngineNotReady(self._reason) from error
                raise
            finally:
                call.steps.append(("engine", granted, time.monotonic()))
                self._leave(ticket)
        except Exception as error:
            call.error = error
            raise

    async def _wait(
        self, ticket: Ticket, lora: LoRARequest | None, request_id: str | None, call: Call
    ) -> None:
        began = ticket.arrived = time.monotonic()
        warm = ticket.digest is None or self.residency.standing(ticket.digest) is State.HOST
        try:
            self.admission.join(ticket)
        except Overloaded:
            self.refused += 1
            raise
        if ticket.digest is not None:
            self.residency.counts.hits += warm
            self.residency.counts.misses += not warm
        turn = _Turn(lora, request_id, asyncio.get_running_loop().create_future())
        self._turns[ticket] = turn
        try:
            self._decide()
            await turn.granted
            if turn.swap is not None:
                await _done(turn.swap)
        except BaseException:
            self._leave(ticket)
            raise
        finally:
            now = time.monotonic()
            call.steps.append(("admission", began, now))
            load = 0.0
            if turn.load is not None:
                begin, end = max(began, turn.load[0]), turn.load[1]
                call.steps.append(("load", begin, end))
                load = end - begin
            call.queue_ms, call.load_ms = (now - began - load) * 1000, load * 1000

    def _leave(self, ticket: Ticket) -> None:
        turn = self._turns.pop(ticket)
        self._worked += 1
        self.admission.leave(ticket)
        if turn.entry is not None:
            proof = ticket.adapter == PROOFS and turn.entry.uses == 1
            self.residency.release(turn.entry, useless=proof)
        if ticket.digest in self._retiring:
            self._finish_retiring(ticket.digest)
        self._decide()

    def _progress(self, ticket: Ticket, tokens: int) -> None:
        first = not ticket.output and tokens
        self.admission.progress(ticket, tokens)
        if first and len(self.admission):
            self._decide()

    # -- doing what was decided ---------------------------------------------------------------

    def _decide(self) -> None:
        """Begins what loads and grants what turns there are to begin and grant now."""
        if self._suspects is not None:
            return
        self._admit()
        if not len(self.admission):
            return
        if time.monotonic() - self._metered > TICK_S:
            self._meter()
            self._admit()
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick())

    def _admit(self) -> None:
        self._load_wanted()
        while (ticket := self.admission.next()) is not None:
            self._grant(ticket)
        self._load_wanted()

    def _grant(self, ticket: Ticket) -> None:
        turn = self._turns[ticket]
        if turn.lora is not None and ticket.digest is not None:
            turn.entry = self.residency.lease(ticket.digest)
            if (swap := self.residency.enter(ticket.digest)) is not None:
                self._swaps[ticket.digest] = self._spawn(self._swap(turn.lora, swap))
            turn.swap = self._swaps.get(ticket.digest)
        if not turn.granted.done():
            turn.granted.set_result(None)

    def _load_wanted(self) -> None:
        """Has what requests wait for loaded, in the order in which their turns come."""
        while len(self._loads) < LOADING and (digest := self.admission.wanted()) is not None:
            lora = self._turns[self.admission.waiting(digest)[0]].lora
            assert lora is not None  # noqa: S101 (the base is never loaded)

            def before(other: str, digest: str = digest) -> bool:
                return self.admission.precedes(other, digest)

            # What nobody waits for goes first, then what is waited for by those who come later.
            if not self._begin(lora, self.admission.waits) and not self._begin(lora, before):
                return

    def _begin(self, lora: LoRARequest, keep: Callable[[str], bool]) -> bool:
        load = self.residency.begin(lora.lora_name, keep)
        if load is None:
            return False
        if load.evict is not None:
            self._recent.event("evicted", load.evict)
            # First, and not with the load: what goes into its slot meanwhile comes after this.
            self._spawn(self._drop(load.evict))
        self._loads[load.digest] = self._spawn(self._load(lora, load))
        return True

    async def _load(self, lora: LoRARequest, load: Load) -> Exception | None:
        """Loads; the requests that wait for it get the error that it returns, and nobody else."""
        began = time.monotonic()
        error: Exception | None = None
        try:
            async with asyncio.timeout(self.times.load):
                size = await self._stage(lora)
        except TimeoutError:
            error = AdapterLoadTimeout(
                f"Loading {load.digest} has taken more than {self.times.load:.0f} s. Ask again."
            )
        except AdapterError as refused:
            error = refused
        except LoadFailed as failed:
            error = AdapterLoadFailed(
                f"The adapter {load.digest} could not be loaded into the engine: {failed}"
            )
        except Exception as unexpected:
            error = self._unexpected(unexpected, load.digest)
        del self._loads[load.digest]
        for ticket in self.admission.waiting(load.digest):
            self._turns[ticket].load = (began, time.monotonic())
        took = time.monotonic() - began
        self._recent.event("loaded" if error is None else "load_failed", load.digest, took)
        if error is None:
            self.residency.loaded(load.digest, took, size)
        else:
            self._refuse(load.digest, error)
            self.residency.failed(load.digest)
        if load.digest in self._retiring:
            self._finish_retiring(load.digest)
        self._decide()
        return error

    async def _stage(self, lora: LoRARequest) -> int:
        """Has it on the host; returns its bytes. A form that turns out damaged is made again."""
        size = await self._vouch(lora)
        try:
            await self._loader.stage(lora)
        except LoadFailed:
            if not await self._reading(self._ingest.mend, lora.lora_name):
                raise
            size = await self._vouch(lora)
            await self._loader.stage(lora)
        return size

    async def _vouch(self, lora: LoRARequest) -> int:
        """Makes sure of the files to load; returns their bytes."""

        def vouch() -> int:
            if lora.lora_path == str(self._ingest.form(lora.lora_name)):
                self._ingest.vouch(lora.lora_name)
            return sum(each.stat().st_size for each in Path(lora.lora_path).iterdir())

        return await self._reading(vouch)

    async def _reading(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work, *args)

    async def _swap(self, lora: LoRARequest, swap: Swap) -> Exception | None:
        out = None if swap.out is None else self._ids[swap.out]
        began = time.monotonic()
        error: Exception | None = None
        try:
            async with asyncio.timeout(self.times.load):
                await self._loader.slot(lora.lora_int_id, out)
        except Exception as failed:
            error = self._unexpected(failed, swap.digest)
        else:
            self._recent.event("slot", swap.digest, time.monotonic() - began)
        # Taken out and put in again meanwhile, it is another swap's to say where it is.
        if self._swaps.get(swap.digest) is asyncio.current_task():
            del self._swaps[swap.digest]
            if error is not None:
                self.residency.leave(swap.digest)
        return error

    def _unexpected(self, error: Exception, digest: str) -> Exception:
        if self._suspects is not None or self._engine.errored:
            self._note_end()
            return EngineNotReady(self._reason)
        return AdapterLoadFailed(f"The adapter {digest} could not be put into the engine: {error}")

    def _refuse(self, digest: str, error: Exception) -> None:
        for ticket in self.admission.waiting(digest):
            self.admission.leave(ticket)
            self._turns[ticket].refuse(error)

    async def _tick(self) -> None:
        """While somebody waits: counts the tokens of those that run, and ends waits too long."""
        try:
            while len(self.admission):
                await asyncio.sleep(TICK_S)
                self._expire()
                self._decide()
        finally:
            self._ticking = None

    def _meter(self) -> None:
        """Counts tokens that the engine has and has not handed out yet."""
        self._metered = time.monotonic()
        for ticket in list(self.admission.running()):
            if (turn := self._turns.get(ticket)) and turn.request_id is not None:
                self.admission.progress(ticket, produced(self._engine, turn.request_id))

    def _expire(self) -> None:
        latest = time.monotonic() - self.times.queue
        while (ticket := self.admission.oldest()) is not None and ticket.arrived < latest:
            self.admission.leave(ticket)
            self.refused += 1
            self._turns[ticket].refuse(
                Overloaded(f"No turn came within {self.times.queue:.0f} s. Ask again later.")
            )

    def _note_end(self) -> frozenset[str]:
        """What was in the engine when it ended, by the first who noticed."""
        if self._suspects is None:
            running = {ticket.digest for ticket in self.admission.running()}
            self._suspects = frozenset(
                digest for digest in running | self._loads.keys() | self._swaps.keys() if digest
            )
        return self._suspects

    def _finish_retiring(self, digest: str) -> None:
        if not self.admission.has(digest) and digest not in self._loads:
            self._retiring.discard(digest)
            self._spawn(self._remove(digest, unload=self.residency.drop(digest)))

    async def _remove(self, digest: str, *, unload: bool) -> None:
        try:
            if unload:
                await self._drop(digest)
        finally:
            await asyncio.to_thread(self._ingest.collect, digest)

    async def _drop(self, digest: str) -> None:
        with suppress(Exception):  # an engine that has ended has nothing loaded
            await self._loader.drop([self._ids[digest]])

    def _request(self, version: Version) -> LoRARequest:
        digest = version.digest
        return LoRARequest(digest, self._id(digest), str(self._ingest.form(digest)))

    def _id(self, digest: str) -> int:
        if digest not in self._ids:
            self._ids[digest] = next(self._numbers)
        return self._ids[digest]

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.create_task(work)
        self._worked += 1
        self._tasks.add(task)  # the loop keeps only a weak reference
        task.add_done_callback(self._tasks.discard)
        return task


def _note_times(call: Call, meter: Meter, output: Any, last: float | None) -> float | None:
    """Notes when the tokens of an output came, the ones before at `last`.

    Returns when these came, if that of the next is to be held against it.
    """
    now = time.monotonic()
    if call.first is None:
        call.first = now - (0.0 if meter.streams else first_token_age(output))
    if not meter.streams or len(output.outputs) != 1:
        return None
    if last is not None:
        call.gaps.append(now - last)
    return now


def _no_model(asked: str, param: str) -> AdapterNotFound:
    return AdapterNotFound(
        f"There is no model or adapter {asked!r}. GET /v1/models lists them.", param=param
    )


def _ends_engine() -> Problem:
    return Problem(
        "engine_ended",
        "engine",
        "The engine has ended each time that it was to try this adapter out.",
        SAVE_AGAIN.format("works"),
    )


async def _done(task: asyncio.Task[Exception | None]) -> None:
    """Waits for a load or a swap, and raises its error. Others may wait for it too: it goes on when
    this request is given up.
    """
    await asyncio.wait([task])
    error = EngineNotReady(ENDED) if task.cancelled() else task.result()
    if error is not None:
        raise error


def _not_loaded(error: AdapterLoadFailed) -> Problem:
    return Problem("engine_refused", "engine", error.message, SAVE_AGAIN.format("loads"))


class Proving:
    """`Gateway.prove` for adapters that arrive while no engine is there: they wait for it."""

    def __init__(self) -> None:
        self._gateway: Gateway | None = None
        self._decided = asyncio.Event()
        self.refused: set[str] = set()  # digests that the engine has ended with

    async def __call__(self, digest: str, folder: Path) -> Effect:
        """Raises what `Gateway.prove` does, and EngineNotReady if no engine came."""
        await self._decided.wait()
        if digest in self.refused:
            raise InvalidAdapter([_ends_engine()])
        if self._gateway is None:
            raise EngineNotReady("The engine did not start.")
        return await self._gateway.prove(digest, folder)

    def begin(self, gateway: Gateway) -> None:
        """The engine can answer."""
        self._gateway = gateway
        self._decided.set()

    def pause(self) -> None:
        """The engine has ended, and another will come."""
        self._decided.clear()

    def give_up(self) -> None:
        """No engine will come."""
        self._gateway = None
        self._decided.set()
