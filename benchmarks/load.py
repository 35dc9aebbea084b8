"""The client: sends requests, streams replies, notes when each token came.

The same for every target but for the body of a request and how tokens are counted (`Dialect`).
It reads no more of a reply than it must: it runs on the cores of the server that it measures.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import aiohttp

from benchmarks.metrics import Reply
from benchmarks.workload import Request

LOAD_MS = "x-loraplex-load-ms"  # the header that says how long the adapter's load took; 0: none


class LoadError(Exception):
    """Requests failed, or a reply is not as long as it has to be."""


class Dialect(Protocol):
    """How one kind of server wants to be asked."""

    path: str

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON body that asks for exactly `request.output` tokens, greedily, streamed."""
        ...

    def count(self, event: dict[str, Any], before: int) -> int:
        """How many tokens there are after `event`, when there were `before`."""
        ...


class OpenAI:
    """vLLM's `/v1/completions`, and everything that speaks it."""

    path = "/v1/completions"

    def body(self, request: Request) -> dict[str, Any]:
        return {
            "model": request.adapter or "base",
            "prompt": request.prompt,
            "max_tokens": request.output,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,  # text can lag behind tokens, and tokens can share an event
        }

    def count(self, event: dict[str, Any], before: int) -> int:
        return before + sum(len(c.get("token_ids") or ()) for c in event.get("choices", ()))


class Llama:
    """llama.cpp's own `/completion`; adapters go by number and are off unless named."""

    path = "/completion"

    def __init__(self, adapters: Sequence[str]) -> None:
        self._ids = {name: i for i, name in enumerate(adapters)}

    def body(self, request: Request) -> dict[str, Any]:
        return {
            "prompt": request.prompt,
            "n_predict": request.output,
            "ignore_eos": True,
            "temperature": 0,
            "samplers": ["temperature"],
            "stream": True,
            "cache_prompt": False,
            "timings_per_token": True,  # has the running number of tokens
            "lora": [
                {"id": i, "scale": 1.0 if name == request.adapter else 0.0}
                for name, i in self._ids.items()
            ],
        }

    def count(self, event: dict[str, Any], before: int) -> int:
        return max(before, int(event.get("timings", {}).get("predicted_n", before)))


class Client:
    """Asks one server; the times of its replies count from when it was made."""

    def __init__(self, session: aiohttp.ClientSession, dialect: Dialect) -> None:
        self._session = session
        self._dialect = dialect
        self._began = time.perf_counter()

    def now(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._began

    async def ask(self, request: Request) -> Reply:
        """Sends `request`, not before it is due; a failure is the reply's `error`."""
        if request.due_s is not None:
            await asyncio.sleep(request.due_s - self.now())
        times: list[float] = []
        error = load_ms = None
        sent = self.now()
        body = self._dialect.body(request)
        try:
            async with self._session.post(self._dialect.path, json=body) as response:
                if LOAD_MS in response.headers:
                    load_ms = float(response.headers[LOAD_MS])
                if response.status != 200:
                    error = f"{response.status} {(await response.text())[:300]}"
                else:
                    error = await self._read(response, times)
        except (aiohttp.ClientError, TimeoutError, OSError) as failure:
            error = f"{type(failure).__name__} {failure}".strip()
        if error is None and len(times) != request.output:
            error = f"{len(times)} tokens came, {request.output} were asked for"
        return Reply(
            stream=request.stream,
            adapter=request.adapter,
            prompt=len(request.prompt),
            output=request.output,
            due_s=sent if request.due_s is None else request.due_s,
            sent_s=sent,
            times=tuple(times),
            error=error,
            load_ms=load_ms,
        )

    async def in_turn(self, requests: Sequence[Request]) -> list[Reply]:
        """Sends each when the one before has ended."""
        return [await self.ask(request) for request in requests]

    async def _read(self, response: aiohttp.ClientResponse, times: list[float]) -> str | None:
        """Fills `times` from the events of `response`; what went wrong, if anything."""
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            now = self.now()
            event = json.loads(line[6:])
            if "error" in event:
                return str(event["error"])[:300]
            times += [now] * (self._dialect.count(event, len(times)) - len(times))
        return None


@asynccontextmanager
async def connect(url: str, dialect: Dialect, limit_s: float = 900) -> AsyncIterator[Client]:
    """A client of the server at `url`, whose requests may take `limit_s` seconds each."""
    # A connection for each request: some servers close theirs after a reply without saying so.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=limit_s)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        yield Client(session, dialect)


async def run(
    url: str, dialect: Dialect, requests: Sequence[Request], limit_s: float = 900
) -> list[Reply]:
    """Sends `requests` to the server at `url`; those of one stream one after the other.

    Raises:
        LoadError: one failed, or took longer than `limit_s`; names the first reason.
    """
    streams: dict[int, list[Request]] = {}
    for request in requests:
        streams.setdefault(request.stream, []).append(request)
    async with connect(url, dialect, limit_s) as client:
        done = await asyncio.gather(*(client.in_turn(mine) for mine in streams.values()))
    replies = [reply for stream in done for reply in stream]
    failed = [reply.error for reply in replies if reply.error]
    if failed:
        raise LoadError(f"{len(failed)} of {len(requests)} requests failed: {failed[0]}")
    return replies
