"""Object storage on loopback: a stand-in for Google's and Azure's, and a line that can break."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.adapters.loopback import BLOCK, Replies, running

WHEN = "Wed, 21 Oct 2015 07:28:00 GMT"


@dataclass
class Objects:
    """One bucket, or container. `seen` has the path and the headers of every request."""

    objects: dict[str, bytes]
    etag: str = "1"
    knows_if_match: bool = True
    status: int | None = None  # of every answer
    location: str | None = None  # where every question is sent
    drops: list[int] = field(default_factory=list)  # bytes after which objects break off, in turn
    changes: bool = False  # after the first break
    pause_s: float = 0.0  # before each block
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Serves it; the URL."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads, server.block_on_close = True, False
        server.handle_error = lambda *_: None  # a client that hangs up is no error
        with running(server):
            yield f"http://127.0.0.1:{server.server_address[1]}"

    def listing(self, prefix: str) -> str:
        """What lies directly below `prefix`, as S3 and Google say it, and as Azure does."""
        found = [
            (escape(key), len(content))
            for key, content in self.objects.items()
            if key.startswith(prefix) and "/" not in key[len(prefix) :]
        ]
        contents = "".join(
            f"<Contents><Key>{key}</Key><Size>{size}</Size><ETag>{self.etag}</ETag>"
            f"<LastModified>2015-10-21T07:28:00.000Z</LastModified></Contents>"
            for key, size in found
        )
        blobs = "".join(
            f"<Blob><Name>{key}</Name><Properties><Last-Modified>{WHEN}</Last-Modified>"
            f"<Etag>{self.etag}</Etag><Content-Length>{size}</Content-Length>"
            "<Content-Type>x/y</Content-Type></Properties></Blob>"
            for key, size in found
        )
        return f"{contents}<Blobs>{blobs}</Blobs><NextMarker/>"


def _handler(store: Objects) -> type[Replies]:
    class Handler(Replies):
        def do_GET(self) -> None:
            split = urlsplit(self.path)
            store.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
            query = parse_qs(split.query, keep_blank_values=True)
            if store.location:
                self._reply(307, {"Location": store.location})
            elif store.status:
                self._reply(store.status, {}, b"<Error><Key>SECRET</Key></Error>")
            elif "comp" in query or "list-type" in query:
                listing = store.listing(query.get("prefix", [""])[0])
                azure = "comp" in query
                root = "EnumerationResults" if azure else "ListBucketResult"
                listing = (
                    listing[listing.index("<Blobs>") :]
                    if azure
                    else listing[: listing.index("<Blobs>")]
                )
                self._reply(200, {}, f"<{root}>{listing}</{root}>".encode())
            else:
                self._object(unquote(split.path).split("/", 2)[2])

        def _object(self, key: str) -> None:
            content = store.objects.get(key)
            wanted = self.headers["If-Match"]
            if content is None:
                self._reply(404, {})
            elif store.knows_if_match and wanted not in (None, f'"{store.etag}"'):
                self._reply(412, {})
            else:
                self._send(content)

        def _send(self, content: bytes) -> None:
            asked = self.headers["Range"]
            begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            self.send_response(206 if asked else 200)
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - begin))
            self.send_header("ETag", f'"{store.etag}"')
            self.send_header("Last-Modified", WHEN)
            self.end_headers()
            drop = store.drops.pop(0) if store.drops and len(content) > 1000 else None
            sent = content[begin:][:drop]
            for at in range(0, len(sent), BLOCK):
                time.sleep(store.pause_s)
                self.wfile.write(sent[at : at + BLOCK])
            if drop is not None:
                self.close_connection = True
                if store.changes:
                    store.etag = "2"

    return Handler


@dataclass
class Line:
    """A TCP connection to `port` of this machine that breaks after some bytes of the answers."""

    port: int
    cuts: list[int] = field(default_factory=list)  # bytes, one for each connection in turn
    connections: int = 0

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Serves it; the URL."""
        line = self

        class Relay(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                line.connections += 1
                left = line.cuts.pop(0) if line.cuts else None
                with socket.create_connection(("127.0.0.1", line.port)) as far:
                    threading.Thread(target=_pump, args=(self.request, far), daemon=True).start()
                    _pump(far, self.request, left)
                    self.request.shutdown(socket.SHUT_RDWR)

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay)
        server.daemon_threads, server.block_on_close = True, False
        server.handle_error = lambda *_: None
        with running(server):
            yield f"http://127.0.0.1:{server.server_address[1]}"


def _pump(source: socket.socket, target: socket.socket, limit: int | None = None) -> None:
    """Hands on what comes from `source`, at most `limit` bytes."""
    try:
        while (limit is None or limit > 0) and (block := source.recv(BLOCK)):
            target.sendall(block[:limit])
            limit = None if limit is None else limit - len(block)
    except OSError:  # the other side hung up
        pass
