"""OpenTelemetry traces of requests, where vLLM's --otlp-traces-endpoint is set.

vLLM sets up the exporter and adds the engine's own span, as a child of the one that it finds in the
request's headers, which is ours.
"""

import time
from collections.abc import Iterable, Mapping

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_propagator = TraceContextTextMapPropagator()
Headers = list[tuple[bytes, bytes]]
Step = tuple[str, float, float]  # name, begin and end, of time.monotonic


def begin(headers: Headers) -> tuple[Span, Headers]:
    """A request's span, under the one that its headers name if any; and headers that name it."""
    tracer = trace.get_tracer("loraplex")
    sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    span = tracer.start_span("request", _propagator.extract(sent), SpanKind.SERVER)
    ours: dict[str, str] = {}
    _propagator.inject(ours, trace.set_span_in_context(span))
    kept = [(name, value) for name, value in headers if name.decode("latin-1") not in ours]
    return span, kept + [(name.encode(), value.encode()) for name, value in ours.items()]


def end(
    span: Span, name: str, failed: bool, about: Mapping[str, str | int], steps: Iterable[Step]
) -> None:
    """Ends a request's span, and makes one of each step that it went through."""
    since = time.time_ns() - time.monotonic_ns()
    tracer = trace.get_tracer("loraplex")
    for step, begun, ended in steps:
        start = since + int(begun * 1e9)
        child = tracer.start_span(step, trace.set_span_in_context(span), start_time=start)
        child.end(since + int(ended * 1e9))
    span.update_name(name)
    span.set_attributes(dict(about))
    if failed:
        span.set_status(Status(StatusCode.ERROR))
    span.end()
