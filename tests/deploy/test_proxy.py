"""HAProxy with our configuration, before servers of which one only says that it is ending."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from tests.proxy import proxy

pytestmark = pytest.mark.skipif(
    shutil.which("haproxy") is None, reason="needs haproxy (apt-get install haproxy)"
)


@contextmanager
def server(status: int) -> Iterator[tuple[str, list[int]]]:
    """One that answers its probe with 200 and all else with `status`; and what it has answered."""
    answered: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(200)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            answered.append(status)
            time.sleep(0.02 if status == 200 else 0)
            self._answer(status)

        def _answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"127.0.0.1:{http.server_port}", answered
        http.shutdown()
        thread.join()


def test_who_ends_is_not_heard_by_a_client() -> None:
    """Bodies come after their headers, as most clients send them."""
    with (
        server(503) as (a, ending),
        server(200) as (b, serving),
        proxy(a, b) as front,
        httpx.Client(base_url=front) as client,
    ):
        for _ in range(40):
            body = (part for part in (b'{"prompt": ', b'"On"}'))
            headers = {"content-length": "16"}
            assert client.post("/v1/completions", content=body, headers=headers).status_code == 200
    assert ending and len(serving) == 40
