"""What the server does at this moment and did in the last minutes, for those who watch it."""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from adapters.names import name_of
from server.gateway import Gateway
from server.keys import BASE
from server.recent import INTERVAL_S, Event, Interval, Work
from server.routes import Json, Served
from server.routes.access import Asker

router = APIRouter(prefix="/v1/live", tags=["operations"])

WINDOW_S = 60
SHOWN = 50  # adapters, the busiest

References = Mapping[str, Sequence[str]]  # by digest, those that the key may see


@router.get("")
async def live(
    serving: Served,
    asker: Asker,
    since: Annotated[
        float, Query(ge=0, description="Only intervals and events after this: `now` of a reply.")
    ] = 0.0,
) -> JSONResponse:
    """Slots and host cache with what is in them, queues, and the last minutes by adapter.

    Adapters are the busiest of the last minute, among those that the key may use; totals are of all
    of these.
    """
    now, gateway, recent = time.time(), serving.gateway, serving.recent
    events = [event for event in recent.events if event.at > since]
    digests = {event.digest for event in events}
    if gateway is not None:
        digests.update(entry.digest for entry in gateway.residency.entries())
    references = {
        digest: [each for each in named if asker.sees(name_of(each))]
        for digest, named in (await run_sync(serving.registry.references, digests)).items()
    }
    resident = _resident(gateway, references) if gateway else []
    tiers = _tiers(gateway, references) if gateway else {}
    base = serving.settings.base_name
    tokens = recent.tokens(WINDOW_S)
    counts = _counts(gateway, base) if gateway else {}
    names = [
        name
        for name in {base, *tokens, *counts, *tiers}
        if asker.sees(BASE if name == base else name)
    ]
    counts = {name: counts.get(name, (0, 0)) for name in names}
    names.sort(key=lambda name: (-sum(counts[name]), -tokens[name], name))
    shown = names[:SHOWN]
    seconds = recent.looks_back(WINDOW_S)
    shows = {
        "object": "live",
        "now": now,
        "started": serving.started,
        "base": base,
        "ready": serving.handlers is not None and not serving.ending,
        "restarts": serving.restarts,
        "slots": serving.settings.max_loras,
        "places": serving.settings.host_capacity,
        "resident": resident,
        "window_s": WINDOW_S,
        "totals": {
            "adapters": len(names),
            "waiting": sum(waiting for waiting, _ in counts.values()),
            "running": sum(running for _, running in counts.values()),
            "tokens_per_s": round(sum(tokens[name] for name in names) / seconds, 2),
        },
        "adapters": [
            _adapter(name, recent.within(WINDOW_S, name), seconds, counts[name])
            | {"residency": None if name == base else tiers.get(name, "disk")}
            for name in shown
        ],
        "events": [_event(event, references) for event in events if references.get(event.digest)],
        "interval_s": INTERVAL_S,
        "history": [_interval(each, shown) for each in recent.since(since)],
    }
    return JSONResponse(shows)  # as it is: to look through all of it first would take longer


def _tiers(gateway: Gateway, references: References) -> dict[str, str]:
    """Where each adapter of which a version is loaded is, at its nearest."""
    names = {digest: map(name_of, some) for digest, some in references.items()}
    return {name: tier for name, (tier, _) in gateway.residency.nearest(names).items()}


def _counts(gateway: Gateway, base: str) -> dict[str, tuple[int, int]]:
    """Waiting and running requests by adapter, without those of proofs."""
    counts = gateway.admission.counts()
    return {name: each for name, each in counts.items() if name == base or gateway.is_adapter(name)}


def _resident(gateway: Gateway, references: References) -> list[Json]:
    """What is in the engine; of what the key may not see, only that there is something."""
    return [
        {
            "reference": seen[0] if seen else None,
            "references": seen,
            "digest": entry.digest if seen else None,
            "residency": gateway.residency.tier(entry.digest),
            "bytes": entry.bytes,
            "leases": entry.leases,
            "pinned": entry.pinned,
        }
        for entry in gateway.residency.entries()
        for seen in [references.get(entry.digest, ())]
    ]


def _adapter(name: str, work: Work, seconds: float, counts: tuple[int, int]) -> Json:
    waiting, running = counts
    return {
        "adapter": name,
        "waiting": waiting,
        "running": running,
        "requests": work.requests,
        "errors": work.errors,
        "prompt_tokens_per_s": round(work.prompt_tokens / seconds, 2),
        "tokens_per_s": round(work.output_tokens / seconds, 2),
        "first_token_s": {"p50": work.first.percentile(0.5), "p99": work.first.percentile(0.99)},
        "token_gap_s": {"p50": work.gaps.percentile(0.5), "p99": work.gaps.percentile(0.99)},
    }


def _event(event: Event, references: References) -> Json:
    seen = references[event.digest]
    return {
        "at": event.at,
        "event": event.what,
        "reference": seen[0],
        "references": seen,
        "seconds": None if event.seconds is None else round(event.seconds, 3),
    }


def _interval(interval: Interval, shown: Collection[str]) -> Json:
    return {
        "at": interval.at,
        "adapters": {
            name: {
                "tokens": work.output_tokens,
                "requests": work.requests,
                "errors": work.errors,
                "first_token_s": work.first.percentile(0.5),
                "token_gap_s": work.gaps.percentile(0.5),
            }
            for name, work in interval.work.items()
            if name in shown
        },
    }
