"""Who may call what: the table of all routes, and the guard in front of them.

Pure ASGI, so that streams pass as they are, and a request is refused before its body is read.
"""

from typing import Annotated, cast
from urllib.parse import urlsplit

from anyio.to_thread import run_sync
from fastapi import Depends, Request
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from server.config import is_loopback
from server.errors import EngineNotReady, Forbidden, NoKey, ServerError
from server.keys import ADMIN, ANYBODY, INFER, READ, WRITE, Key, Keys
from server.routes import ENDING, Serving
from server.routes.failure import respond

PUBLIC = None

# Every route of the app, by method and path, and the scope that it takes. What is not here is
# refused, and a test walks the app's routes for such.
ACCESS: dict[tuple[str, str], str | None] = {
    ("POST", "/v1/chat/completions"): INFER,
    ("POST", "/v1/completions"): INFER,
    ("POST", "/v1/responses"): INFER,
    ("POST", "/v1/messages"): INFER,
    ("POST", "/v1/messages/count_tokens"): INFER,
    ("POST", "/tokenize"): INFER,
    ("POST", "/detokenize"): INFER,
    ("GET", "/v1/models"): INFER,
    ("GET", "/v1/models/{name:path}"): INFER,
    ("GET", "/v1/adapters"): READ,
    ("GET", "/v1/adapters/{name}"): READ,
    ("GET", "/v1/adapters/{name}/versions/{version}"): READ,
    ("GET", "/v1/live"): READ,
    ("POST", "/v1/adapters"): WRITE,
    ("POST", "/v1/adapters:check"): WRITE,
    ("PUT", "/v1/adapters/{name}/aliases/{alias}"): WRITE,
    ("DELETE", "/v1/adapters/{name}/aliases/{alias}"): WRITE,
    ("DELETE", "/v1/adapters/{name}"): WRITE,
    ("DELETE", "/v1/adapters/{name}/versions/{version}"): WRITE,
    ("POST", "/v1/adapters/{name}/load"): WRITE,
    ("POST", "/v1/adapters/{name}/unload"): WRITE,
    ("POST", "/v1/load_lora_adapter"): WRITE,
    ("POST", "/v1/unload_lora_adapter"): WRITE,
    # What is pinned takes places from everybody.
    ("POST", "/v1/adapters/{name}/pin"): ADMIN,
    ("POST", "/v1/adapters/{name}/unpin"): ADMIN,
    ("POST", "/v1/keys"): ADMIN,
    ("GET", "/v1/keys"): ADMIN,
    ("GET", "/v1/keys/{id}"): ADMIN,
    ("DELETE", "/v1/keys/{id}"): ADMIN,
    ("POST", "/v1/keys/{id}/rotate"): ADMIN,
    ("GET", "/v1/usage"): ADMIN,
    # They name adapters: `--metrics-without-key` opens them.
    ("GET", "/metrics"): READ,
    ("GET", "/"): PUBLIC,
    ("GET", "/console/{file}"): PUBLIC,
    ("GET", "/health"): PUBLIC,
    ("GET", "/ready"): PUBLIC,
    ("GET", "/docs"): PUBLIC,
    ("GET", "/docs/oauth2-redirect"): PUBLIC,
    ("GET", "/redoc"): PUBLIC,
    ("GET", "/openapi.json"): PUBLIC,
}


INFERENCE = {route for route, scope in ACCESS.items() if scope == INFER and route[0] == "POST"}
# What a server that ends goes on answering.
_TO_THE_END = {"/health", "/metrics"}
# They do not count for a key's limits: who has used them up may see so, and watching uses up none.
_LOOKS = {"GET", "HEAD"}


class Guard:
    """Lets a request through that may call what it calls, within what its key may use."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app = app
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; what routes are to know of who asks is in its state."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, serving = Request(scope), self._serving
        state = scope.setdefault("state", {})
        try:
            state["key"] = key = await self._admit(request)
            if counts := scope["method"] not in _LOOKS:
                serving.quotas.enter(key)
        except ServerError as error:
            await respond(request, error)(scope, receive, send)
            return
        serving.under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            serving.under_way -= 1
            if counts:
                call = state.get("call")
                serving.quotas.leave(key, call.prompt_tokens + call.output_tokens if call else 0)

    async def _admit(self, request: Request) -> Key:
        """Who asks. Raises NoKey, Forbidden, and EngineNotReady when the server is ending."""
        path = _route(request.scope)
        if path is None:  # there is nothing, and the app says so
            return ANYBODY
        request.state.route = path
        if self._serving.ending and path not in _TO_THE_END:
            raise EngineNotReady(ENDING)
        method = "GET" if request.method == "HEAD" else request.method
        if (method, path) not in ACCESS:
            raise Forbidden(f"Nobody may call {method} {path}.")
        needed = ACCESS[method, path]
        settings = self._serving.settings
        if needed is PUBLIC or (path == "/metrics" and settings.metrics_without_key):
            return ANYBODY
        token = _token(request)
        key = await run_sync(_whose, self._serving.keys, token)
        if key is None and not token:
            raise NoKey("This server needs an API key: send Authorization: Bearer KEY.")
        if key is None:
            raise NoKey("This API key does not exist, was revoked, or has expired.")
        if key is ANYBODY and not settings.insecure:
            _refuse_strangers(request)
        if not key.may(needed):
            raise Forbidden(f"This API key has not the scope {needed}, which this call needs.")
        return key


def _route(scope: Scope) -> str | None:
    """The path, as in ACCESS, of the route that would answer."""
    for route in scope["app"].routes:
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return cast(str, route.path)
    return None


def _whose(keys: Keys, token: str) -> Key | None:
    """Who sends a token, ANYBODY where no keys are; None if one is needed and this is none."""
    if not keys.wanted():
        return ANYBODY
    return keys.find(token) if token else None


def _token(request: Request) -> str:
    if key := request.headers.get("x-api-key"):  # Anthropic's way
        return key
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _refuse_strangers(request: Request) -> None:
    """Without keys, only who is on this machine may ask, and no page that a browser there shows.

    Any site can have a browser send requests to this machine, or have its own name mean it; both
    are seen by the headers. Raises Forbidden.
    """
    origin = request.headers.get("origin")
    try:
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname
        page = None if origin is None else urlsplit(origin).hostname
    except ValueError:  # neither is a name of this machine
        host = page = None
    if is_loopback(host) and (origin is None or is_loopback(page)):
        return
    raise Forbidden(
        "Without API keys this server answers only to its own machine, by the name localhost. "
        "Create a key (loraplex keys create), or start it with --insecure."
    )


def _asker(request: Request) -> Key:
    return cast(Key, request.state.key)


Asker = Annotated[Key, Depends(_asker)]
