"""Traces of the real server, as a collector receives them."""

import time
from typing import Any

import httpx

from tests.real.collector import Collector
from tests.real.conftest import Server

SENT_S = 30  # spans are sent every 5
SPANS = ["POST /v1/completions", "admission", "engine", "llm_request", "load"]  # vLLM's among them


def test_a_collector_is_sent_the_trace_of_a_request(server: Server, collector: Collector) -> None:
    """One span each for the request, its load, its wait and the engine, in the client's trace."""
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    body = {"model": "sql", "prompt": "A prompt that nobody sees.", "max_tokens": 4}
    sent = {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "traced"}
    httpx.post(f"{server.url}/v1/adapters/sql/unload").raise_for_status()  # so that it is loaded
    reply = httpx.post(f"{server.url}/v1/completions", json=body, headers=sent, timeout=60)
    assert reply.status_code == 200, reply.text

    deadline = time.monotonic() + SENT_S
    while len(ours := _of_trace(collector, trace)) < len(SPANS) and time.monotonic() < deadline:
        time.sleep(0.5)
    named = {span.name: span for span in ours}
    assert sorted(named) == SPANS
    request = named.pop("POST /v1/completions")
    assert request.parent_span_id.hex() == parent
    for span in named.values():
        assert span.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano
    about = {each.key: each.value for each in request.attributes}
    assert about["loraplex.request_id"].string_value == "traced"
    assert about["loraplex.adapter"].string_value == "sql"
    assert about["loraplex.output_tokens"].int_value == 4
    assert b"nobody sees" not in b"".join(span.SerializeToString() for span in ours)


def _of_trace(collector: Collector, trace: str) -> list[Any]:
    return [span for span in list(collector.spans) if span.trace_id.hex() == trace]
