"""Errors as HTTP responses, in the shape of the protocol that was called."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from adapters.errors import AdapterError
from server.engine.handlers import explain
from server.engine.requests import RefusedError
from server.errors import RETRY_AFTER_S, NoKey, RateLimited, ServerError, body, describe

_ANTHROPIC = {404: "not_found_error", 413: "request_too_large", 503: "overloaded_error"}


def failure(
    request: Request, status: int, message: str, code: str | None = None, param: str | None = None
) -> JSONResponse:
    """An error response: OpenAI's shape, or Anthropic's under /v1/messages."""
    request.state.code = code
    return _response(request, status, body(status, message, code, param))


def install(app: FastAPI) -> None:
    """Makes every exception of a route an error response."""
    app.add_exception_handler(ServerError, _ours)
    app.add_exception_handler(AdapterError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _unexpected)


def respond(request: Request, error: ServerError | AdapterError) -> JSONResponse:
    """The error response of an exception of ours."""
    request.state.code = error.code
    headers = {}
    if isinstance(error, NoKey):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, RateLimited):
        headers["retry-after"] = str(error.retry_after)
    return _response(request, *describe(error), headers)


async def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServerError | AdapterError)  # noqa: S101 (what it is installed for)
    return respond(request, error)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    found = error.errors()
    where = [".".join(str(part) for part in e["loc"] if part != "body") for e in found]
    said = [f"{w}: {e['msg']}" if w else str(e["msg"]) for w, e in zip(where, found, strict=True)]
    return failure(
        request, 400, "; ".join(dict.fromkeys(said)), "invalid_request", where[0] or None
    )


async def _refused(request: Request, error: Exception) -> JSONResponse:
    said = explain(error).error
    return failure(request, said.code, said.message, "invalid_request", said.param)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101
    message = str(error.detail)
    if error.status_code == 404:
        message = f"There is nothing at {request.method} {request.url.path}. GET /docs lists calls."
    return failure(request, error.status_code, message, _CODES.get(error.status_code))


async def _left(request: Request, error: Exception) -> Response:
    # Nobody reads it: the journal has a status, and the log no trace of what is no mistake.
    return Response(status_code=499)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # The message stays in the log (uvicorn writes it with its trace): it may hold paths or data.
    return failure(request, 500, "Something went wrong in the server; its log says what.")


_CODES = {404: "not_found", 405: "method_not_allowed"}


def _response(
    request: Request, status: int, content: dict[str, Any], headers: Mapping[str, str] | None = None
) -> JSONResponse:
    if request.url.path.startswith("/v1/messages"):
        error = content["error"]
        kind = _ANTHROPIC.get(status, error["type"] if status < 500 else "api_error")
        content = {"type": "error", "error": {"type": kind, "message": error["message"]}}
    usual = {"retry-after": str(RETRY_AFTER_S[status])} if status in RETRY_AFTER_S else {}
    return JSONResponse(content, status_code=status, headers=usual | dict(headers or {}))
