"""A model of the engine in which the server's own `Admission` and `Residency` decide.

Time goes from step to step of the engine. In a step every sequence that has its prompt behind it
gets one token, and prompts that wait get what is left of the step's tokens, in the order of
admission. Steps between which nothing happens are taken at once. Loads go on beside the steps, a
copy into a slot holds the next step up.
"""

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from server.admission import OUTPUT, PROMPT, Admission, Limits, Ticket
from server.residency import Entry, Lru, Policy, Residency, State

LOADING = 2  # adapters that are loaded at once, as in the gateway
COUNTED = 16  # steps after which tokens are counted while somebody waits, to be fast
MB = 1e6
BASE = "base"


@dataclass(frozen=True)
class Engine:
    """What things take, in seconds; `load_bytes_s` and `slot_bytes_s` are bytes a second.

    The defaults are what was measured on two cores with a base of 135 million parameters: 26 ms a
    step with one stream, 40 to 45 with eight, 1.7 s for a prompt of 1,500 tokens, and loads of 60
    and 520 ms for 10 and 78 MB.
    """

    step: float = 0.025
    sequence: float = 0.0023
    adapter: float = 0.0006
    prompt_token: float = 0.0011
    load: float = 0.02
    load_bytes_s: float = 160 * MB
    slot_bytes_s: float = 2000 * MB


# A base of 7 billion parameters: 20 ms a step with 32 streams; 40 to 80 MB load in 50 to 100 ms.
GPU = Engine(0.0155, 0.00007, 0.00008, 0.00005, 0.01, 900 * MB, 20000 * MB)


@dataclass(frozen=True)
class Request:
    """`prompt` and `output` are tokens, `arrival` seconds from the beginning; None is the base.

    `most` is how long the reply might become, for all that the server knows; `output` if 0.
    """

    adapter: str | None
    prompt: int
    output: int
    arrival: float = 0.0
    most: int = 0


@dataclass(slots=True)
class Served:
    """What happened to a request: seconds from the beginning, `first` of its first token."""

    request: Request
    arrival: float
    first: float = math.inf
    end: float = math.inf

    @property
    def ttft(self) -> float:
        return self.first - self.arrival


@dataclass
class Outcome:
    """`served` by the order of their ends; `service` by adapter, in what the counters count."""

    served: list[Served]
    seconds: float
    steps: int = 0
    swaps: int = 0
    loads: int = 0
    hits: int = 0
    load_s: float = 0.0
    service: Counter[str] = field(default_factory=Counter)


class Scheduler(Protocol):
    """What the model asks of `Admission`."""

    def join(self, ticket: Ticket) -> None: ...
    def next(self) -> Ticket | None: ...
    def progress(self, ticket: Ticket, output: int) -> None: ...
    def leave(self, ticket: Ticket) -> None: ...
    def changed(self, digest: str) -> None: ...
    def wanted(self) -> str | None: ...
    def waits(self, digest: str) -> bool: ...
    def precedes(self, digest: str, other: str) -> bool: ...
    def __len__(self) -> int: ...


class Fcfs:
    """Stock vLLM's rule: by arrival; an adapter for which no slot is free is overtaken."""

    def __init__(self, limits: Limits, standing: Callable[[str], State | None]) -> None:
        self._limits = limits
        self._standing = standing
        self._lanes: dict[str | None, deque[Ticket]] = {}
        self._running: Counter[str | None] = Counter()
        self._prefill = 0
        self._waiting = 0
        self._cold: dict[str, None] = {}
        self._count = 0

    def join(self, ticket: Ticket) -> None:
        ticket.number = self._count = self._count + 1
        self._waiting += 1
        self._lanes.setdefault(ticket.digest, deque()).append(ticket)
        if ticket.digest is not None and self._standing(ticket.digest) is None:
            self._cold[ticket.digest] = None

    def next(self) -> Ticket | None:
        if self._running.total() >= self._limits.requests or self._prefill >= self._limits.prefill:
            return None
        free = len(self._running.keys() - {None}) < self._limits.slots
        heads = [
            self._lanes[digest][0]
            for digest in (self._lanes if free else {None: 0, **self._running})
            if digest in self._lanes and (digest is None or self._standing(digest) is State.HOST)
        ]
        ticket = min(heads, key=lambda each: each.number, default=None)
        if ticket is not None:
            self._pop(ticket)
            self._running[ticket.digest] += 1
            self._prefill += ticket.prompt
            ticket.admitted = True
        return ticket

    def _pop(self, ticket: Ticket) -> None:
        lane = self._lanes[ticket.digest]
        lane.remove(ticket)
        self._waiting -= 1
        if not lane:
            del self._lanes[ticket.digest]

    def progress(self, ticket: Ticket, output: int) -> None:
        if not ticket.output and output:
            self._prefill -= ticket.prompt
        ticket.output = output

    def leave(self, ticket: Ticket) -> None:
        if not ticket.admitted:
            self._pop(ticket)
            return
        self._running[ticket.digest] -= 1
        if not self._running[ticket.digest]:
            del self._running[ticket.digest]

    def changed(self, digest: str) -> None:
        self._cold.pop(digest, None)
        if self._standing(digest) is None and digest in self._lanes:
            self._cold[digest] = None

    def wanted(self) -> str | None:
        return min(self._cold, key=lambda each: self._lanes[each][0].number, default=None)

    def waits(self, digest: str) -> bool:
        return digest in self._lanes

    def precedes(self, digest: str, other: str) -> bool:
        if digest not in self._lanes or other not in self._lanes:
            return digest in self._lanes
        return self._lanes[digest][0].number <= self._lanes[other][0].number

    def __len__(self) -> int:
        return self._waiting


@dataclass(eq=False, slots=True)
class _Sequence:
    ticket: Ticket
    served: Served
    client: int | None
    entry: Entry | None = None
    began: int = -1  # the step before its first token; -1: none yet

    @property
    def adapter(self) -> str | None:
        return self.served.request.adapter


class Simulation:
    """One engine with its queues. `sizes` are bytes of adapters; `size` of those not in it.

    Tokens are counted after each `counted` steps while somebody waits, and an end is noticed
    `noticed` steps after the last token.
    """

    def __init__(
        self,
        limits: Limits,
        engine: Engine | None = None,
        *,
        places: int | None = None,
        policy: Policy | None = None,
        fcfs: bool = False,
        sizes: Mapping[str, int] | None = None,
        size: int = int(10 * MB),
        weights: Mapping[str, float] | None = None,
        counted: int = COUNTED,
        noticed: int = 0,
    ) -> None:
        self._every = counted
        self._noticed = noticed
        self.engine = engine or Engine()
        self.limits = limits
        self.residency = Residency(places or 2 * limits.slots, limits.slots, policy or Lru())
        standing = self.residency.standing
        self.admission: Scheduler = (
            Fcfs(limits, standing) if fcfs else Admission(limits, standing, weights)
        )
        self.residency.changed = self.admission.changed
        self.now = 0.0
        self.steps = 0
        self.admitted: list[Request] = []
        self.firsts: list[Request] = []
        self._sizes = sizes or {}
        self._size = size
        self._sequences: dict[Ticket, _Sequence] = {}  # that wait or run
        self._running: dict[Ticket, _Sequence] = {}  # that have their first token
        self._prefill: deque[tuple[_Sequence, int]] = deque()  # and prompt tokens yet to do
        self._ends: list[tuple[int, int, _Sequence]] = []
        self._loads: list[tuple[float, float, str]] = []  # end, seconds, digest
        self._in_batch: Counter[str] = Counter()
        self._clients: Sequence[Iterator[Request]] = ()
        self._due: list[tuple[float, int, Request]] = []  # of clients
        self._counted = 0
        self._outcome = Outcome([], 0.0)

    def run(
        self,
        requests: Iterable[Request] = (),
        clients: Sequence[Iterator[Request]] = (),
        until: float = math.inf,
        every: Callable[[int], None] | None = None,
    ) -> Outcome:
        """Serves `requests`, which are by arrival, and those of `clients`, until `until` seconds.

        A client sends its next one, whose `arrival` is how long it thinks, when the last has ended.
        What runs at the end is not in `served`, but its tokens are in `service`. `every` is told
        the number of requests served, now and then.
        """
        self._clients = clients
        for client in range(len(clients)):
            self._send_next(client)
        open_load = iter(requests)
        coming = next(open_load, None)
        told = 0
        while self.now < until:
            while coming is not None and coming.arrival <= self.now:
                self._join(coming, coming.arrival, None)
                coming = next(open_load, None)
            while self._due and self._due[0][0] <= self.now:
                due, client, request = heapq.heappop(self._due)
                self._join(request, due, client)
            while self._loads and self._loads[0][0] <= self.now:
                _, seconds, digest = heapq.heappop(self._loads)
                self.residency.loaded(digest, seconds, self._bytes(digest))
            if len(self.admission):
                self._decide()
            event = min(
                coming.arrival if coming is not None else math.inf,
                self._due[0][0] if self._due else math.inf,
                self._loads[0][0] if self._loads else math.inf,
                until,
            )
            if self._running or self._prefill:
                self._advance(event)
            elif event < math.inf:
                self.now = event
            else:
                break
            if every is not None and len(self._outcome.served) - told >= 5000:
                told = len(self._outcome.served)
                every(told)
        return self._finish()

    def waiting(self) -> Iterator[tuple[str, float]]:
        """Adapter and seconds until now of those that have no first token."""
        for ticket, sequence in self._sequences.items():
            if sequence.began < 0:
                yield ticket.adapter, self.now - ticket.arrived

    # -- the gateway's part -------------------------------------------------------------------

    def _join(self, request: Request, arrival: float, client: int | None) -> None:
        adapter = request.adapter
        ticket = Ticket(
            adapter or BASE,
            adapter,
            request.prompt,
            request.most or request.output,
            arrived=arrival,
        )
        self._outcome.hits += adapter is None or self.residency.standing(adapter) is State.HOST
        self._sequences[ticket] = _Sequence(ticket, Served(request, arrival), client)
        self.admission.join(ticket)

    def _decide(self) -> None:
        self._load_wanted()
        granted = False
        while (ticket := self.admission.next()) is not None:
            self._grant(self._sequences[ticket])
            granted = True
        if granted:
            self._load_wanted()

    def _load_wanted(self) -> None:
        admission = self.admission
        while len(self._loads) < LOADING and (digest := admission.wanted()) is not None:

            def before(other: str, digest: str = digest) -> bool:
                return admission.precedes(other, digest)

            if not self.residency.begin(digest, admission.waits) and not self.residency.begin(
                digest, before
            ):
                return
            seconds = self.engine.load + self._bytes(digest) / self.engine.load_bytes_s
            self._outcome.load_s += seconds
            heapq.heappush(self._loads, (self.now + seconds, seconds, digest))

    def _grant(self, sequence: _Sequence) -> None:
        adapter = sequence.adapter
        if adapter is not None:
            sequence.entry = self.residency.lease(adapter)
            if self.residency.enter(adapter) is not None:
                self.now += self._bytes(adapter) / self.engine.slot_bytes_s
            self._in_batch[adapter] += 1
        self.admitted.append(sequence.served.request)
        self._prefill.append((sequence, sequence.ticket.prompt))

    # -- the engine's part --------------------------------------------------------------------

    def _step_s(self, prompt_tokens: int = 0) -> float:
        engine = self.engine
        return (
            engine.step
            + engine.sequence * len(self._running)
            + engine.adapter * len(self._in_batch)
            + engine.prompt_token * prompt_tokens
        )

    def _advance(self, event: float) -> None:
        """To the next step after which something has happened, or that ends after `event`."""
        if self._prefill:
            self._prefill_step()
        else:
            step = self._step_s()
            steps = self._ends[0][0] - self.steps
            if event < self.now + steps * step:
                steps = max(1, math.ceil((event - self.now) / step))
            if len(self.admission):
                steps = min(steps, max(1, self._counted + self._every - self.steps))
            self.steps += steps
            self.now += steps * step
        while self._ends and self._ends[0][0] <= self.steps:
            self._end(heapq.heappop(self._ends)[2])
        if self.steps - self._counted >= self._every and len(self.admission):
            self._counted = self.steps
            for ticket, sequence in self._running.items():
                self.admission.progress(ticket, self._output(sequence))

    def _prefill_step(self) -> None:
        budget = left = max(1, self.limits.prefill - len(self._running))
        first: list[_Sequence] = []
        while self._prefill and left:
            sequence, tokens = self._prefill[0]
            if tokens > left:
                self._prefill[0] = (sequence, tokens - left)
                left = 0
            else:
                self._prefill.popleft()
                left -= tokens
                first.append(sequence)
        self.now += self._step_s(budget - left)
        self.steps += 1
        for sequence in first:
            self._first(sequence)

    def _first(self, sequence: _Sequence) -> None:
        sequence.began = self.steps - 1
        sequence.served.first = self.now
        self.firsts.append(sequence.served.request)
        self.admission.progress(sequence.ticket, 1)
        self._running[sequence.ticket] = sequence
        ends = sequence.began + sequence.served.request.output + self._noticed
        heapq.heappush(self._ends, (ends, len(self.firsts), sequence))

    def _end(self, sequence: _Sequence) -> None:
        ticket, request = sequence.ticket, sequence.served.request
        sequence.served.end = self.now
        self._outcome.served.append(sequence.served)
        self.admission.progress(ticket, request.output)
        self.admission.leave(ticket)
        del self._running[ticket], self._sequences[ticket]
        self._outcome.service[ticket.adapter] += _service(request.prompt, request.output)
        if sequence.entry is not None and request.adapter is not None:
            self.residency.release(sequence.entry)
            self._in_batch[request.adapter] -= 1
            if not self._in_batch[request.adapter]:
                del self._in_batch[request.adapter]
        if sequence.client is not None:
            self._send_next(sequence.client)

    def _send_next(self, client: int) -> None:
        request = next(self._clients[client], None)
        if request is not None:
            heapq.heappush(self._due, (self.now + request.arrival, client, request))

    def _finish(self) -> Outcome:
        outcome = self._outcome
        for ticket, sequence in self._running.items():
            outcome.service[ticket.adapter] += _service(ticket.prompt, self._output(sequence))
        counts = self.residency.counts
        outcome.seconds, outcome.steps = self.now, self.steps
        outcome.swaps, outcome.loads = counts.swaps, counts.loads
        return outcome

    def _output(self, sequence: _Sequence) -> int:
        return min(self.steps - sequence.began, sequence.served.request.output)

    def _bytes(self, digest: str) -> int:
        return self._sizes.get(digest, self._size)


def _service(prompt: int, output: int) -> int:
    return int(PROMPT * prompt + OUTPUT * output)


@dataclass(frozen=True)
class Order:
    """The indices of a trace's requests, as they were admitted and as their first tokens came."""

    admitted: list[int]
    first: list[int]
    first_s: list[float]  # of each request of the trace, seconds


def replay(trace: Sequence[Request], limits: Limits, engine: Engine | None = None) -> Order:
    """In what order a recorded trace is served; compared with a real server's, it tests the model.

    Adapters have all places that they need.
    """
    places = max(limits.slots, len({request.adapter for request in trace}))
    # The gateway counts after every step, and hears of an end when the next one has begun.
    simulation = Simulation(limits, engine, places=places, counted=1, noticed=1)
    order = sorted(range(len(trace)), key=lambda index: trace[index].arrival)
    index = {id(trace[i]): i for i in order}
    if len(index) < len(trace):
        raise ValueError("a request is in the trace twice")
    outcome = simulation.run(trace[i] for i in order)
    first = {id(served.request): served.first for served in outcome.served}
    return Order(
        [index[id(request)] for request in simulation.admitted],
        [index[id(request)] for request in simulation.firsts],
        [first[id(request)] for request in trace],
    )
