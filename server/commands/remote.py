"""A running server, as commands ask it: one HTTP client, its errors, and streamed replies."""

import os
import re
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import httpx2
import typer

BASE = "base"  # what requests call it
LOCAL = "http://127.0.0.1:8000"
KEY = "LORAPLEX_API_KEY"
CONNECT_S = 10.0
ANSWER_S = 30.0  # that a server has for what it only looks up
COMPLETION_S = 0.5  # that the shell waits for names, at most

Json = dict[str, Any]


class Refused(Exception):
    """What a server, or something else that answers at its address, said no to.

    `body` is the error as the server says it; `problems` are an adapter's, each with `code`,
    `where`, `message` and `fix`.
    """

    def __init__(self, status: int, body: Json) -> None:
        self.status = status
        self.body = body
        self.problems: list[dict[str, str]] = body.get("problems") or []
        message = str(body.get("message") or f"HTTP status {status}")
        if self.problems:
            count = len(self.problems)
            message = f"The adapter was refused{f', for {count} reasons' if count > 1 else ''}:"
        if status == 401:
            message += f" Commands send the key that is in {KEY}."
        super().__init__(message)


class Unreachable(Exception):
    """Nothing answers, or a server that is not ready."""


def complete_name(context: typer.Context, incomplete: str) -> list[str]:
    """Adapters' names for the shell's completion; none where anything is amiss."""
    try:
        with server(context.params.get("url") or LOCAL, timeout_s=COMPLETION_S) as client:
            asked = {"prefix": incomplete, "limit": "100"}
            page = client.get("/v1/adapters", params=asked).json()
    except (Refused, Unreachable, typer.BadParameter, ValueError):
        return []
    return [adapter["name"] for adapter in page["data"]]


def complete_names(context: typer.Context, incomplete: str) -> list[str]:
    """The same for the last of several, with commas between them, of which the base can be one."""
    before, comma, last = incomplete.rpartition(",")
    found = [BASE] * BASE.startswith(last) + complete_name(context, last)
    return [before + comma + name for name in found]


def names(text: str) -> list[str]:
    """The references in `text`, with commas between them. Raises BadParameter if there is none."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise typer.BadParameter("Name at least one, like base,sql.", param_hint="--adapters")
    return found


Url = Annotated[
    str, typer.Option(envvar="LORAPLEX_URL", help=f"Server to ask; {KEY} is the key it gets.")
]
Reference = Annotated[
    str,
    typer.Argument(
        metavar="NAME[@VERSION]",
        help="An adapter: NAME is its newest version; @VERSION is a number, alias or digest.",
        autocompletion=complete_name,
    ),
]


def must_exist(client: httpx2.Client, reference: str) -> None:
    """Raises Refused unless there is an adapter, or the base, that requests call so."""
    client.get(f"/v1/models/{quote(reference)}")


@contextmanager
def server(url: str, timeout_s: float | None = None) -> Iterator[httpx2.Client]:
    """A client of the server at `url`; an answer may take `timeout_s`, as long as it will if None.

    Raises, from within:
        Refused: an answer that is an error, or not one of Loraplex.
        Unreachable: there is no answer, or it is that the engine is not ready.
        BadParameter: `url` is none, or the key in the environment.
    """
    key = _key()
    if not _is_port(url):
        raise typer.BadParameter(f"{url} has no port that there can be.", param_hint="--url")
    timeout = httpx2.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s or CONNECT_S))
    try:
        with httpx2.Client(
            base_url=url.rstrip("/").removesuffix("/v1"),
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=timeout,
            limits=httpx2.Limits(max_connections=None),
            event_hooks={"response": [_raise]},
        ) as client:
            yield client
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol):
        raise typer.BadParameter(
            f"{url} is no address of a server: write it like {LOCAL}", param_hint="--url"
        ) from None
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        said = str(error)
        if isinstance(error, httpx2.ConnectTimeout) or re.search("refused|attempts failed", said):
            said = "start one with `loraplex serve`, or name another with --url or LORAPLEX_URL"
        else:
            said = f"is --url right? ({said})"
        raise Unreachable(f"no server answers at {url}: {said}") from None
    except httpx2.ReadTimeout:
        raise Unreachable(
            f"{url} has not answered within {timeout_s:g} s: is it very busy, or not Loraplex?"
        ) from None
    except httpx2.TransportError as error:
        said = str(error) or type(error).__name__
        raise Unreachable(f"the connection to {url} was lost ({said}): ask again") from None


def _is_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def _key() -> str | None:
    """The key to send, if there is one. A line break at its end, as files have, is none of it."""
    key = os.environ.get(KEY, "").strip()
    if re.search(r"[^\x21-\x7e]", key):
        raise typer.BadParameter(
            "It has a space, a line break or a letter that no key has: set it again.",
            param_hint=KEY,
        )
    return key or None


def _raise(response: httpx2.Response) -> None:
    """Raises what an answer means that is not what was asked for."""
    kind = response.headers.get("content-type", "").partition(";")[0]
    if response.is_success and kind in ("application/json", "text/event-stream"):
        return
    response.read()
    try:
        body = response.json()["error"]
        body["message"]  # there must be one
    except (ValueError, KeyError, TypeError):
        body = {
            "message": f"{response.request.url} answers with HTTP status {response.status_code}, "
            "but not as Loraplex does: is --url right?"
        }
    raise _failure(response.status_code, body)


def _failure(status: int, error: Json) -> Refused | Unreachable:
    if error.get("code") == "engine_not_ready":
        return Unreachable(error["message"])
    return Refused(status, error)


@dataclass
class Reply:
    """A streamed reply, as far as it has come.

    `reference` is the version that answers, `base` for none. `times` has for each token the seconds
    from asking to when it came; `tokens` is how many the server counted.
    """

    reference: str = ""
    text: str = ""
    times: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def first_token_s(self) -> float | None:
        """Seconds to the first token; None if none has come."""
        return self.times[0] if self.times else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second, from the first to the last; None before there are two."""
        took = self.times[-1] - self.times[0] if self.times else 0.0
        return (self.tokens - 1) / took if took and self.tokens > 1 else None

    def as_dict(self) -> Json:
        """For JSON; the keys are stable."""
        return {
            "version": self.reference,
            "text": self.text,
            "first_token_s": self.first_token_s,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens_per_s,
        }


def stream(client: httpx2.Client, path: str, body: Json, reply: Reply) -> Generator[str]:
    """Asks for a completion or a chat's next message; gives its text piece by piece.

    `reply` is brought up to date with each. Who stops before the end ends the reply on the server
    too. Raises Refused or Unreachable, also for what fails in the middle of it.
    """
    asked = time.perf_counter()
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    with client.sse(path, method="POST", json=body) as events:
        headers = events.response.headers
        name, version = (headers.get(f"x-loraplex-{what}") for what in ("adapter", "version"))
        reply.reference = f"{name}@{version}" if name else BASE
        for event in events:
            if event.data == "[DONE]":
                return
            said: Any = event.json()
            if "error" in said:
                raise _failure(500, said["error"])
            if said.get("usage"):
                reply.tokens = said["usage"]["completion_tokens"]
            for choice in said["choices"]:
                piece = choice["text"] if "text" in choice else choice["delta"].get("content")
                # Ids, where they are asked for, count exactly: pieces can have none or several.
                count = len(choice.get("token_ids") or ()) or bool(piece)
                reply.times += [time.perf_counter() - asked] * count
                reply.tokens = max(reply.tokens, len(reply.times))
                reply.text += piece or ""
                if piece:
                    yield piece
