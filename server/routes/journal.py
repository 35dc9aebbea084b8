"""What becomes of every request: its line in the log, its trace, and what it counts as.

Pure ASGI and outermost, so that what is refused is noted as well, and a stream when it has ended.
"""

import re
import time
import uuid
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs, tracing
from server.engine.call import Call
from server.keys import ANYBODY, BASE, Key
from server.routes import Serving
from server.routes.access import INFERENCE
from server.traffic import Outcome

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_GONE = 499  # the client has hung up before there was a status
NOWHERE = "none"  # the route of what nothing answers
_PROBES = {"/health", "/ready", "/metrics"}


class Journal:
    """Notes each request when it is over."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app = app
        self._serving = serving
        self._traced = bool(serving.args.otlp_traces_endpoint)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; its id is the client's `x-request-id`, or made here, and in the reply."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, span = time.monotonic(), None
        id = Request(scope).headers.get("x-request-id", "")
        if _ID.fullmatch(id) is None:
            id = uuid.uuid4().hex
            kept = [pair for pair in scope["headers"] if pair[0] != b"x-request-id"]
            scope["headers"] = [*kept, (b"x-request-id", id.encode())]
        if self._traced:
            span, scope["headers"] = tracing.begin(scope["headers"])
        state, status = scope.setdefault("state", {}), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:
            status = status or 500
            raise
        finally:
            about = self._note(scope, state, id, status or _GONE, began)
            if span is not None:
                call: Call | None = state.get("call")
                name = f"{scope['method']} {about['route']}"
                steps = call.steps if call else ()
                failed = about["status"] >= 500 or "code" in about
                told = {f"loraplex.{k}": v for k, v in about.items() if isinstance(v, str | int)}
                tracing.end(span, name, failed, told, steps)

    def _note(
        self, scope: Scope, state: dict[str, Any], id: str, status: int, began: float
    ) -> dict[str, Any]:
        serving, now = self._serving, time.monotonic()
        route, method = state.get("route", NOWHERE), scope["method"]
        key: Key = state.get("key", ANYBODY)
        call: Call | None = state.get("call")
        code = state.get("code") or getattr(call and call.error, "code", None)
        about: dict[str, Any] = {
            "request_id": id,
            "key": key.id or None,
            "method": method,
            "route": route,
            "status": status,
            "code": code,
            "duration_ms": _ms(now - began),
        }
        # A method can be any word where nothing answers it.
        serving.traffic.http[method if route != NOWHERE else "any", route, status] += 1
        if (method, route) in INFERENCE:
            outcome = _outcome(call, status, code, began)
            adapter = None
            if call is not None:
                adapter = call.adapter or serving.settings.base_name
                about |= _about(call, outcome)
            serving.traffic.count(adapter, outcome, now)
            if adapter is not None:
                failed = status >= 400 or code is not None
                serving.recent.ended(adapter, failed, outcome.prompt_tokens, outcome.first)
        if call is not None and (call.prompt_tokens or call.output_tokens):
            serving.usage.add(key.id, call.adapter or BASE, call.prompt_tokens, call.output_tokens)
        about = {name: value for name, value in about.items() if value is not None}
        if route not in _PROBES or status not in (200, 503):
            logs.note("request", **about)
        return about


def _outcome(call: Call | None, status: int, code: str | None, began: float) -> Outcome:
    if call is None:
        return Outcome(status, code)
    queued = any(name == "admission" for name, _, _ in call.steps)
    return Outcome(
        status,
        code,
        call.prompt_tokens,
        call.output_tokens,
        queue=call.queue_ms / 1000 if queued else None,
        load=call.load_ms / 1000 if call.load_ms else None,
        first=None if call.first is None else call.first - began,
        gaps=call.gaps,
    )


def _about(call: Call, outcome: Outcome) -> dict[str, Any]:
    """What the log says of a call; never what was asked or answered."""
    return {
        "adapter": call.adapter or BASE,
        "version": call.version.number if call.version else None,
        "prompt_tokens": call.prompt_tokens,
        "output_tokens": call.output_tokens,
        "queue_ms": None if outcome.queue is None else _ms(outcome.queue),
        "load_ms": None if outcome.load is None else _ms(outcome.load),
        "ttft_ms": None if outcome.first is None else _ms(outcome.first),
    }


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
