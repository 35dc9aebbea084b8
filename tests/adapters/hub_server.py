"""A stand-in for the Hugging Face hub on loopback, with as many vices as a test asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from tests.adapters.loopback import BLOCK, Replies

REPO = "org/sql"
COMMIT = "0123456789" * 4
REVISIONS = ("main", "v1", "refs/pr/1", COMMIT)
PREFIX = f"^/({REPO}/resolve/{COMMIT}|content)/"


@dataclass
class Hub:
    """One repository. `seen` has the path and the headers of every request."""

    files: dict[str, bytes]
    name: str = REPO  # what it says it is called
    token: str | None = None  # whoever comes without it gets 401
    sizes: dict[str, int] = field(default_factory=dict)  # announced instead of the true ones
    sha256: str | None = None  # announced for every file instead of the true one
    answer: bytes | None = None  # to a question about the repository
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)  # by path: status and code
    redirects: dict[str, str] = field(default_factory=dict)  # by path
    drops: list[int] = field(default_factory=list)  # bytes after which connections break, in turn
    knows_ranges: bool = True
    endless: bool = False  # files never end
    pause_s: float = 0.0  # before each block
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def __enter__(self) -> Hub:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._server.handle_error = lambda *_: None  # a client that hangs up is no error
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def asked(self) -> list[str]:
        """The paths of all requests, in order."""
        return [path for path, _ in self.seen]

    def info(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "sha": COMMIT,
            "siblings": [
                {
                    "rfilename": path,
                    "size": self.sizes.get(path, len(content)),
                    "lfs": {
                        "sha256": self.sha256 or hashlib.sha256(content).hexdigest(),
                        "size": self.sizes.get(path, len(content)),
                        "pointerSize": 134,
                    },
                }
                for path, content in self.files.items()
            ],
        }

    def tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            for path, content in self.files.items()
        ]


def _handler(hub: Hub) -> type[Replies]:
    class Handler(Replies):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub.seen.append((path, {k.lower(): v for k, v in self.headers.items()}))
            if path in hub.redirects:
                self._reply(302, {"Location": hub.redirects[path]})
            elif path in hub.refusals:
                status, code = hub.refusals[path]
                self._reply(status, {"X-Error-Code": code} if code else {}, b"no" * 100)
            elif hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
                self._reply(401, {})
            elif path == f"/api/models/{REPO}/tree/{COMMIT}":
                self._reply(200, {}, json.dumps(hub.tree()).encode())
            elif path.startswith("/api/models/"):
                self._info(path)
            else:
                self._file(path)

        def do_HEAD(self) -> None:
            self.do_GET()

        def _info(self, path: str) -> None:
            match = re.fullmatch(f"/api/models/{REPO}(?:/revision/([^/]+))?", path)
            if not match:
                self._reply(404, {"X-Error-Code": "RepoNotFound"})
            elif (match[1] or "main").replace("%2F", "/") not in REVISIONS:
                self._reply(404, {"X-Error-Code": "RevisionNotFound"})
            else:
                self._reply(200, {}, hub.answer or json.dumps(hub.info()).encode())

        def _file(self, path: str) -> None:
            content = hub.files.get(re.sub(PREFIX, "", unquote(path)))
            if content is None:
                self._reply(404, {"X-Error-Code": "EntryNotFound"})
                return
            begin = 0
            headers = {
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Xet-Hash": "0" * 64,
            }
            if hub.knows_ranges and (asked := self.headers["Range"]):
                begin = int(asked.removeprefix("bytes=").removesuffix("-"))
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            self.send_response(206 if begin else 200)
            for name, value in headers.items():
                self.send_header(name, value)
            if hub.endless:
                self.send_header("Connection", "close")
            else:
                self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            if self.command != "HEAD":
                self._send(content[begin:])

        def _send(self, content: bytes) -> None:
            drop = hub.drops.pop(0) if hub.drops and not content.startswith(b"{") else None
            try:
                for at in range(0, len(content[:drop]), BLOCK):
                    time.sleep(hub.pause_s)
                    self.wfile.write(content[:drop][at : at + BLOCK])
                while hub.endless:
                    self.wfile.write(bytes(BLOCK))
            except OSError:  # the other side has had enough
                self.close_connection = True
            if drop is not None:
                self.close_connection = True

    return Handler
