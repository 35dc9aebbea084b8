"""A stand-in for a server's /v1/live, and nothing else of one."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NOW = 1_800_000_000.0


def adapter(name: str, **more: Any) -> dict[str, Any]:
    quiet = {"p50": None, "p99": None}
    return {
        **{"adapter": name, "waiting": 0, "running": 0, "residency": "disk", "requests": 1},
        **{"errors": 0, "prompt_tokens_per_s": 0, "tokens_per_s": 0.0},
        **{"first_token_s": quiet, "token_gap_s": quiet},
        **more,
    }


def event(what: str, *references: str, at: float, seconds: float | None = None) -> dict[str, Any]:
    """Something that happened to the version that these adapters have."""
    named = {"reference": references[0], "references": list(references)}
    return {"at": at, "event": what, **named, "seconds": seconds}


def live(**more: Any) -> dict[str, Any]:
    """What /v1/live says of a server with some traffic."""
    busy = {"first_token_s": {"p50": 0.21, "p99": 0.4}, "token_gap_s": {"p50": 0.031, "p99": 0.05}}
    sql = adapter("sql", waiting=3, running=2, residency="slot", requests=1234, **busy)
    steps = [
        {"at": NOW - 5 * n, "adapters": {"sql": {"tokens": 160 - 20 * n, "requests": 2}}}
        for n in range(8, -1, -1)
    ]
    resident = [
        {"reference": "sql@1", "residency": "slot", "bytes": 4900000, "leases": 2, "pinned": True},
        {"reference": "code@2", "residency": "host", "bytes": 1, "leases": 0, "pinned": False},
        {"reference": None, "residency": "loading", "bytes": 0, "leases": 0, "pinned": False},
    ]
    return {
        **{"object": "live", "now": NOW, "started": NOW - 7500, "base": "tiny", "ready": True},
        **{"restarts": 1, "slots": 8, "places": 32, "resident": resident, "window_s": 60},
        "adapters": [
            sql | {"tokens_per_s": 31.24},
            adapter("code", residency="host", errors=2),
            adapter("base", residency=None),
        ],
        "events": [
            event("loaded", "sql@1", "database@4", at=NOW - 9, seconds=0.12),
            event("load_failed", "broken@1", at=NOW - 5),
        ],
        **{"interval_s": 5, "history": steps},
        **more,
    }


class LiveServer(ThreadingHTTPServer):
    """Answers with `said`, and counts how often it was `asked`."""

    said: dict[str, Any]
    page: str | None  # what it answers everything with, if it is no server of ours
    asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def do_GET(self) -> None:
        self.server.asked += self.path == "/v1/live"
        page = self.server.page
        body = (page or json.dumps(self.server.said)).encode()
        self.send_response(200 if page or self.path == "/v1/live" else 404)
        self.send_header("content-type", "text/html" if page else "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def serve(page: str | None = None, **more: Any) -> Iterator[LiveServer]:
    """One on a free port."""
    with LiveServer(("127.0.0.1", 0), _Handler) as server:
        server.said, server.page = live(**more), page
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
