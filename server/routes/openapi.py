"""What /openapi.json says beyond what FastAPI finds by itself: keys, and each call's errors."""

from typing import Any

from fastapi import FastAPI

from server.keys import ADMIN, INFER, READ, WRITE
from server.routes.access import ACCESS

# Statuses of errors, by the scope that a call takes: what `server/errors.py` and vLLM's handlers
# answer. Those of the guard come to all that are guarded.
GUARDED = (401, 403, 429, 503)
ERRORS = {
    None: (),
    INFER: (400, 404, 409, 413, 422, 501),
    READ: (400, 404, 409),
    WRITE: (400, 404, 409, 412, 413, 422, 502, 504, 507),
    ADMIN: (400, 404, 409),
}
# Calls that can answer with server-sent events.
STREAMS = {
    ("POST", f"/v1/{name}") for name in ("chat/completions", "completions", "responses", "messages")
}
MEANINGS = {
    400: "The request is not what it should be.",
    401: "No API key, or one that does not hold.",
    403: "The API key has not the scope, or may not use the name; or the source is not allowed.",
    404: "There is no such thing, or none that the API key may use.",
    409: "Its state does not allow that now.",
    412: "An alias does not point where it was expected to.",
    413: "Too large.",
    422: "The adapter was refused; `problems` has every reason.",
    429: "Too much at once, or more than the API key may; `Retry-After` says when to ask again.",
    501: "vLLM does not do this for this model.",
    502: "The source could not be read to its end.",
    503: "The engine is starting or ending, or the adapter could not be loaded; ask again.",
    504: "The source took too long.",
    507: "The disk is full.",
}
_TEXT = {"type": "string"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"anyOf": [_TEXT, {"type": "null"}]},
                "code": {"anyOf": [_TEXT, {"type": "null"}, {"type": "integer"}]},
                "problems": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {name: _TEXT for name in ("code", "where", "message", "fix")},
                    },
                },
            },
        }
    },
}
# Anthropic's calls have its shape.
_ANTHROPICS = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {"type": "object", "properties": {"type": _TEXT, "message": _TEXT}},
    },
}
_KEY = {
    "key": {"type": "http", "scheme": "bearer", "description": "An API key, where there are any."}
}


def document(app: FastAPI) -> None:
    """Has the app's document tell all of it."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(plain())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(made: dict[str, Any]) -> dict[str, Any]:
    parts = made.setdefault("components", {})
    parts["securitySchemes"] = _KEY
    parts.setdefault("schemas", {}).update(Error=_ERROR, AnthropicError=_ANTHROPICS)
    scopes = {
        (method, path.replace(":path", "")): scope for (method, path), scope in ACCESS.items()
    }
    for path, calls in made["paths"].items():
        for method, call in calls.items():
            scope = scopes[method.upper(), path]
            call["responses"].pop("422", None)  # FastAPI's own; here it is a 400
            if scope is not None:
                call["security"] = [{"key": []}]
                call["description"] = f"{call.get('description', '')}\n\nScope: `{scope}`."
            if (method.upper(), path) in STREAMS:
                call["responses"]["200"]["content"]["text/event-stream"] = {"schema": _TEXT}
            for status in (*ERRORS[scope], *(GUARDED if scope else (503,))):
                call["responses"][str(status)] = _response(path, status)
    return made


def _response(path: str, status: int) -> dict[str, Any]:
    name = "AnthropicError" if path.startswith("/v1/messages") else "Error"
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"description": MEANINGS[status], "content": {"application/json": {"schema": schema}}}
