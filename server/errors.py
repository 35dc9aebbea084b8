"""Exceptions of the server, and the one table that turns any exception into an HTTP status."""

from typing import Any

from adapters import errors as adapters


class ServerError(Exception):
    """Something the server cannot do for a request; `code` is for programs, the text for people."""

    code = "server_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class EngineNotReady(ServerError):
    """The engine is starting, or has ended."""

    code = "engine_not_ready"


class AdapterLoadFailed(ServerError):
    """The engine could not load a version that the registry vouches for."""

    code = "adapter_load_failed"


class AdapterLoadTimeout(ServerError):
    """Loading an adapter has taken too long."""

    code = "adapter_load_timeout"


class AdapterInUse(ServerError):
    """An adapter cannot be unloaded: requests use it, or it is pinned."""

    code = "adapter_in_use"


class TooManyPinned(ServerError):
    """No further adapter can be pinned."""

    code = "too_many_pinned"


class Overloaded(ServerError):
    """So much waits already that a request is refused, or it has waited too long."""

    code = "overloaded"


class AdapterConflict(ServerError):
    """`adapter` and `model` name two different adapters."""

    code = "adapter_conflict"


class BadRequest(ServerError):
    """A request whose body or headers are not what they should be."""

    code = "bad_request"


class NoKey(ServerError):
    """A request without an API key where one is needed, or with one that does not hold."""

    code = "invalid_api_key"


class Forbidden(ServerError):
    """What this API key, or this client, may not do."""

    code = "forbidden"


class KeyNotFound(ServerError):
    """No API key has that id."""

    code = "key_not_found"


class RateLimited(ServerError):
    """An API key has used what it may; `retry_after` is in how many seconds it may again."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(f"{message} Ask again in {retry_after} s.")
        self.retry_after = retry_after


class TooManyImports(ServerError):
    """As many imports are under way as may be."""

    code = "too_many_imports"


# Every class of both trees is here; a test fails on one that is not.
STATUS: dict[type[Exception], int] = {
    ServerError: 500,
    EngineNotReady: 503,
    AdapterLoadFailed: 503,
    AdapterLoadTimeout: 503,
    AdapterInUse: 409,
    TooManyPinned: 409,
    Overloaded: 429,
    AdapterConflict: 400,
    BadRequest: 400,
    TooManyImports: 429,
    NoKey: 401,
    Forbidden: 403,
    KeyNotFound: 404,
    RateLimited: 429,
    adapters.AdapterError: 500,
    adapters.InvalidName: 400,
    adapters.ReservedName: 400,
    adapters.InvalidReference: 400,
    adapters.AdapterNotFound: 404,
    adapters.VersionNotFound: 404,
    adapters.AliasNotFound: 404,
    adapters.AliasInUse: 409,
    adapters.AliasConflict: 412,
    adapters.InvalidAdapter: 422,
    adapters.TooLarge: 413,
    adapters.QuotaExceeded: 429,
    adapters.VersionQuarantined: 409,
    adapters.InvalidSource: 400,
    adapters.SourceForbidden: 403,
    adapters.SourceNotFound: 404,
    adapters.SourceFailed: 502,
    adapters.ImportTimeout: 504,
    adapters.ImportStopped: 503,
    adapters.BaseModelError: 500,
    adapters.StoreError: 500,
    adapters.NoSpace: 507,
    adapters.RegistryError: 500,
}
# Seconds, by status: a load or a restart of the engine takes about that, or asks again.
RETRY_AFTER_S = {429: 10, 503: 2}

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def body(
    status: int, message: str, code: str | None = None, param: str | None = None, **more: Any
) -> dict[str, Any]:
    """The OpenAI error body: `{"error": {"message", "type", "param", "code"}}`."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code, **more}}


def describe(error: ServerError | adapters.AdapterError) -> tuple[int, dict[str, Any]]:
    """Status and body for an exception of either tree."""
    status = STATUS[type(error)]
    more = {}
    if isinstance(error, adapters.InvalidAdapter):
        more["problems"] = [problem.as_dict() for problem in error.problems]
    return status, body(status, error.message, error.code, error.param, **more)
