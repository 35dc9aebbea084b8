"""What the server shows at /metrics: its own series, and vLLM's beside them.

Read from where it is known when it is asked for, so that counting costs requests nothing. By
adapter there are those that have a request waiting or running, the busiest (`server/traffic.py`)
and those in the engine: thousands of idle adapters make no series.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import REGISTRY
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector as Collecting

from adapters.names import name_of
from adapters.registry import Registry, Summary
from server.gateway import Gateway
from server.traffic import Histogram, Traffic

# What routers that choose among servers read; vLLM has no words for the second.
LEVELS = {"slot": "gpu", "host": "cpu"}


class Collector(Collecting):
    """The series of one server and of vLLM in its process.

    `gateway` gives the one of now, None between two; `restarts` how many engines came after one.
    """

    def __init__(
        self,
        gateway: Callable[[], Gateway | None],
        restarts: Callable[[], int],
        traffic: Traffic,
        registry: Registry,
    ) -> None:
        self._gateway = gateway
        self._restarts = restarts
        self._traffic = traffic
        self._registry = registry
        self._summary = Summary()
        self._references: Mapping[str, Sequence[str]] = {}

    async def look(self) -> None:
        """Asks the registry, in a thread, what `collect` needs to know of it."""
        gateway, registry = self._gateway(), self._registry
        digests = [entry.digest for entry in gateway.residency.entries()] if gateway else []
        named = self._traffic.names()

        def ask() -> set[str]:
            self._references = registry.references(digests)
            self._summary = registry.summary()
            return registry.alive(named)

        alive = await asyncio.to_thread(ask)
        base = gateway.base_names if gateway else named
        self._traffic.forget(set(named) - alive - set(base))

    def collect(self) -> Iterator[Metric]:
        """All series, as prometheus_client asks for them."""
        yield CounterMetricFamily(
            "loraplex_engine_restarts",
            "Engines that were started after one had ended.",
            self._restarts(),
        )
        yield GaugeMetricFamily(
            "loraplex_tasks", "Tasks of the server's event loop.", len(asyncio.all_tasks())
        )
        yield from _by_adapter(self._traffic)
        yield from _http(self._traffic)
        yield from _stored(self._summary)
        gateway = self._gateway()
        if gateway is not None:
            yield from _queues(gateway)
            yield from _loaded(gateway)
            yield from _for_routers(gateway, self._references)
        yield from REGISTRY.collect()


def _by_adapter(traffic: Traffic) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "loraplex_requests",
        "Inference requests that have ended, by HTTP status; _other is all that have no own name.",
        labels=["adapter", "status"],
    )
    errors = CounterMetricFamily(
        "loraplex_errors", "Those that ended with an error.", labels=["adapter", "code"]
    )
    prompts = CounterMetricFamily(
        "loraplex_prompt_tokens", "Tokens of prompts.", labels=["adapter"]
    )
    outputs = CounterMetricFamily(
        "loraplex_output_tokens", "Tokens of replies.", labels=["adapter"]
    )
    times = {
        "queue": ("queue_seconds", "What requests waited for their turn, loads apart."),
        "load": ("load_wait_seconds", "What requests waited for their adapter to be loaded."),
        "first": ("first_token_seconds", "From a request's arrival to its first token."),
        "gaps": ("token_gap_seconds", "Between two tokens of a stream."),
    }
    histograms = {
        field: HistogramMetricFamily(f"loraplex_{name}", text, labels=["adapter"])
        for field, (name, text) in times.items()
    }
    for adapter, series in traffic.series():
        for status, count in series.requests.items():
            requests.add_metric([adapter, str(status)], count)
        for code, count in series.errors.items():
            errors.add_metric([adapter, code], count)
        prompts.add_metric([adapter], series.prompt_tokens)
        outputs.add_metric([adapter], series.output_tokens)
        for field, family in histograms.items():
            histogram: Histogram = getattr(series, field)
            family.add_metric([adapter], histogram.buckets(), histogram.sum)
    yield from (requests, errors, prompts, outputs, *histograms.values())


def _http(traffic: Traffic) -> Iterator[Metric]:
    calls = CounterMetricFamily(
        "loraplex_http_requests",
        "HTTP requests that have ended; the route `none` is what there is not.",
        labels=["method", "route", "status"],
    )
    for (method, route, status), count in traffic.http.items():
        calls.add_metric([method, route, str(status)], count)
    yield calls


def _stored(summary: Summary) -> Iterator[Metric]:
    yield GaugeMetricFamily("loraplex_adapters", "Adapters in the registry.", summary.adapters)
    versions = GaugeMetricFamily(
        "loraplex_versions", "Versions that are not deleted.", labels=["state"]
    )
    for state, count in summary.versions.items():
        versions.add_metric([state], count)
    yield versions
    yield GaugeMetricFamily(
        "loraplex_stored_bytes", "Of the weights of all versions, equal ones once.", summary.bytes
    )


def _queues(gateway: Gateway) -> Iterator[Metric]:
    waiting = GaugeMetricFamily(
        "loraplex_requests_waiting", "Requests that wait for their turn.", labels=["adapter"]
    )
    running = GaugeMetricFamily(
        "loraplex_requests_running", "Requests in the engine.", labels=["adapter"]
    )
    for name, (waits, runs) in gateway.admission.counts().items():
        waiting.add_metric([name], waits)
        running.add_metric([name], runs)
    oldest = gateway.admission.oldest()
    yield waiting
    yield running
    yield GaugeMetricFamily(
        "loraplex_longest_wait_seconds",
        "How long the request that came first has waited.",
        time.monotonic() - oldest.arrived if oldest else 0.0,
    )
    yield GaugeMetricFamily(
        "loraplex_under_way",
        "Requests that wait or run, and loads, swaps and removals that are not done.",
        gateway.under_way(),
    )
    yield GaugeMetricFamily(
        "loraplex_engine_drift",
        "Differences between what the engine has loaded and what it should have, when last idle.",
        len(gateway.drift),
    )
    yield CounterMetricFamily(
        "loraplex_overloaded",
        "Requests refused because too many waited, or for too long.",
        gateway.refused,
    )


def _loaded(gateway: Gateway) -> Iterator[Metric]:
    residency = gateway.residency
    entries = list(residency.entries())
    counts = residency.counts
    gauges = {
        "host_adapters": ("Adapters in the host cache or on their way there.", len(entries)),
        "host_places": ("Adapters that the host cache holds.", residency.places),
        "host_bytes": ("Bytes of the adapters in the host cache.", residency.bytes()),
        "slots": ("Adapters that one batch can use.", residency.slots),
        "slots_taken": ("Adapters in a slot.", len(residency.in_slots())),
        "leases": ("Running requests on adapters.", sum(entry.leases for entry in entries)),
        "pinned": ("Adapters that are kept loaded.", len(residency.pinned())),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(f"loraplex_{name}", text, value)
    counters = {
        "loads": ("Adapters loaded into the host cache.", counts.loads),
        "load_seconds": ("Seconds that those loads took.", counts.load_s),
        "load_failures": ("Loads that failed.", counts.failures),
        "evictions": ("Adapters evicted from the host cache.", counts.evictions),
        "swaps": ("Adapters put into a slot.", counts.swaps),
        "host_hits": ("Requests that found their adapter in the host cache.", counts.hits),
        "host_misses": ("Requests that did not.", counts.misses),
    }
    for name, (text, count) in counters.items():
        yield CounterMetricFamily(f"loraplex_{name}", text, count)


def _for_routers(gateway: Gateway, references: Mapping[str, Sequence[str]]) -> Iterator[Metric]:
    """vLLM's series on adapters, by the names that clients write, for routers in front of servers.

    vLLM's own is not collected (`launch.start`): in the engine adapters go by their digests.
    """
    counts = gateway.admission.counts()
    adapters = {name: c for name, c in counts.items() if gateway.is_adapter(name)}
    residency = gateway.residency
    info = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters with running and with waiting requests; the value is the time.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    running = ",".join(sorted(name for name, (_, runs) in adapters.items() if runs))
    waiting = ",".join(sorted(name for name, (waits, _) in adapters.items() if waits))
    info.add_metric([str(residency.slots), running, waiting], time.time())
    yield info
    loaded = GaugeMetricFamily(
        "vllm:lora_adapter_loaded",
        "Adapters in a slot (gpu) or only in the host cache (cpu).",
        labels=["adapter_name", "level", "pinned"],
    )
    names = {digest: map(name_of, some) for digest, some in references.items()}
    for name, (tier, pinned) in sorted(residency.nearest(names).items()):
        if (level := LEVELS.get(tier)) is not None:
            loaded.add_metric([name, level, str(pinned).lower()], 1)
    yield loaded
    yield GaugeMetricFamily(
        "vllm:num_gpu_loaded_lora_adapters", "Adapters in a slot.", len(residency.in_slots())
    )
    yield GaugeMetricFamily(
        "vllm:max_gpu_lora_adapters", "Adapters that one batch can use.", residency.slots
    )
