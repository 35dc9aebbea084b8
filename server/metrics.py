"""What the server counts and shows at /metrics, beside vLLM's own series.

Read from admission and residency when they are asked for, so that counting costs requests nothing.
By adapter there are only those that have a request waiting or running: thousands of idle adapters
make no series.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import CollectorRegistry

from server.gateway import Gateway


class Collector:
    """Prometheus' collector of one server; `gateway` gives the one of now, None between two."""

    def __init__(self, gateway: Callable[[], Gateway | None], restarts: Callable[[], int]) -> None:
        self._gateway = gateway
        self._restarts = restarts

    def collect(self) -> Iterator[Metric]:
        """All series, as prometheus_client asks for them."""
        yield CounterMetricFamily(
            "loraplex_engine_restarts",
            "Engines that were started after one had ended.",
            self._restarts(),
        )
        gateway = self._gateway()
        if gateway is None:
            return
        yield from _queues(gateway)
        yield from _loaded(gateway)


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


def registry(collector: Collector) -> CollectorRegistry:
    """A registry of this server's own series: several servers in one process do not mix."""
    own = CollectorRegistry()
    own.register(collector)
    return own
