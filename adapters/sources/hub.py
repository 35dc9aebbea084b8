"""The Hugging Face hub: one folder of one commit.

The library says where the hub is, what its files' URLs are and who asks (HF_ENDPOINT, HF_TOKEN).
The requests are made here. The library's follow redirects anywhere, may use a second protocol
(Xet) with addresses it is told, and hand over 10 MiB at once, which a lost connection would lose
and a stop would have to wait for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub import constants, get_token, hf_hub_url

from adapters import jsontext
from adapters.errors import AdapterError, SourceFailed, SourceForbidden, SourceNotFound, clean
from adapters.sources.address import Address
from adapters.sources.intake import Transfer
from adapters.sources.remote import Dropped, RemoteFile, ask, take

TIMEOUT_S = 10.0  # to connect, and between two blocks

_MAX_REDIRECTS = 5
_MAX_ANSWER = 32 * 2**20  # bytes; a listing of 100,000 files
_CONTENT_HOST = re.compile(rb"([a-z0-9-]+\.)*(huggingface\.co|hf\.co)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BUSY = frozenset({408, 429, 500, 502, 503, 504})


def fetch(
    address: Address,
    into: Path,
    transfer: Transfer,
    allow_pickle: bool = False,
    endpoint: str | None = None,
) -> str:
    """Downloads the adapter at `address` into the folder `into`; its address with the commit.

    `endpoint` is the hub's URL, by default HF_ENDPOINT. Nothing is asked of a host but that and,
    over https, those where the hub keeps content; the token goes to the endpoint only. A failure
    leaves no file. Raises SourceNotFound, SourceForbidden, SourceFailed, InvalidAdapter,
    StoreError and what `transfer` raises.
    """
    if constants.is_offline_mode():
        raise SourceForbidden("The server runs with HF_HUB_OFFLINE: nothing comes from the hub.")
    with httpx2.Client(timeout=TIMEOUT_S, follow_redirects=False) as client:
        repository = _Repository(client, endpoint or constants.ENDPOINT, address, transfer)
        commit, files = repository.look()
        take(files, into, transfer, allow_pickle)
    return str(dataclasses.replace(address, revision=commit))


class _Repository:
    """The hub, as far as one address concerns it."""

    def __init__(
        self, client: httpx2.Client, endpoint: str, address: Address, transfer: Transfer
    ) -> None:
        self._client = client
        self._endpoint = endpoint.rstrip("/")
        self._address = address
        self._transfer = transfer
        self._token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()

    def look(self) -> tuple[str, list[RemoteFile]]:
        """The commit that the address means now, and the files of its folder there."""
        answer = ask(self._answer, self._transfer)
        try:
            info = jsontext.parse(answer)
            name, commit = str(info["id"]), str(info["sha"])
            files = [
                self._file(commit, entry)
                for entry in info["siblings"]
                if str(entry["rfilename"]).rpartition("/")[0] == self._address.folder
            ]
            if not _COMMIT.fullmatch(commit):
                raise ValueError("it names no commit")
        except (KeyError, TypeError, ValueError) as error:
            raise SourceFailed("The hub's answer cannot be understood. Ask again later.") from error
        if name != self._address.place:
            # The hub leads from a former name to the present one, which may not be allowed.
            raise SourceNotFound(f"The repository is called {clean(name, 200)} now. Write that.")
        if not files:
            raise self._nothing()
        return commit, files

    def _file(self, commit: str, entry: dict[str, Any]) -> RemoteFile:
        path, size = entry["rfilename"], entry["size"]
        if type(size) is not int or size < 0:
            raise ValueError("a file has no size")
        url = hf_hub_url(self._address.place, path, revision=commit, endpoint=self._endpoint)
        sha256 = entry["lfs"]["sha256"] if entry.get("lfs") else None
        return RemoteFile(path.rpartition("/")[2], size, partial(self._read, url), sha256)

    def _answer(self) -> bytes:
        url = f"{self._endpoint}/api/models/{self._address.place}"
        if self._address.revision is not None:
            url += f"/revision/{quote(self._address.revision, safe='')}"
        answer = bytearray()
        with self._get(f"{url}?blobs=true") as response:
            for block in response.iter_raw():
                self._transfer.advance()
                answer += block
                if len(answer) > _MAX_ANSWER:
                    raise SourceFailed("The repository has too many files. Make one of its own.")
        return bytes(answer)

    def _read(self, url: str, begin: int) -> Generator[bytes, None, None]:
        with self._get(url, {"range": f"bytes={begin}-"} if begin else {}) as response:
            # Who does not know ranges sends the file from its first byte.
            skip = 0 if response.status_code == 206 else begin
            for block in response.iter_raw():
                self._transfer.advance()
                if kept := block[skip:]:
                    yield kept
                skip = max(0, skip - len(block))

    @contextmanager
    def _get(self, url: str, headers: dict[str, str] | None = None) -> Iterator[httpx2.Response]:
        """The response to a GET, redirects followed as far as they lead to the hub's hosts."""
        with _losses():
            target = httpx2.URL(url)
            for _ in range(_MAX_REDIRECTS + 1):
                sent = {"accept-encoding": "identity", **(headers or {}), **self._permit(target)}
                with self._client.stream("GET", target, headers=sent) as response:
                    if not response.has_redirect_location:
                        self._check(response)
                        yield response
                        return
                    target = target.join(response.headers["location"])
        raise SourceFailed("The hub redirects without end. Ask again later.")

    def _permit(self, target: httpx2.URL) -> dict[str, str]:
        """What to authorise a request to `target` with; raises SourceForbidden for other hosts."""
        if _origin(target) == _origin(httpx2.URL(self._endpoint)):
            return {"authorization": f"Bearer {self._token}"} if self._token else {}
        known = _CONTENT_HOST.fullmatch(target.raw_host) and not target.userinfo
        if not known or target.scheme != "https" or target.port is not None:
            raise SourceForbidden(
                f"The hub leads to {clean(str(target.host), 100)}, which is no host of the hub's. "
                "Nothing was asked of it."
            )
        return {}

    def _check(self, response: httpx2.Response) -> None:
        """Raises what an answer without content means."""
        status, code = response.status_code, response.headers.get("x-error-code")
        place = self._address.place
        if status in (200, 206):
            return
        if status in _BUSY:
            raise Dropped(f"the hub answers with {status}")
        if code == "GatedRepo":
            raise SourceForbidden(
                f"Access to {place} must be granted first: ask for it on the hub, then set "
                "HF_TOKEN for the server."
            )
        if code in ("RevisionNotFound", "EntryNotFound"):
            raise self._nothing()
        if status in (401, 404):  # both for what is private too
            raise SourceNotFound(
                f"There is no {place} on the hub, or it is private: then set HF_TOKEN for the "
                "server."
            )
        if status == 403:
            message = f"The hub refuses {place} to the server's token. Check HF_TOKEN."
            raise SourceForbidden(message)
        raise SourceFailed(f"The hub answers with {status}. Ask again later.")

    def _nothing(self) -> AdapterError:
        revision = self._address.revision or "its newest commit"
        folder = f"folder {self._address.folder}" if self._address.folder else "file"
        message = f"{self._address.place} has no {folder} at {revision}. Check the address."
        return SourceNotFound(message)


@contextmanager
def _losses() -> Iterator[None]:
    """Raises Dropped for a lost connection."""
    try:
        yield
    except httpx2.TimeoutException:
        raise Dropped("the hub is silent") from None
    except httpx2.TransportError as error:
        raise Dropped("the hub's connection was lost or not had") from error
    except httpx2.InvalidURL as error:
        message = "The hub, or where it redirects to, has no valid URL. Check HF_ENDPOINT."
        raise SourceFailed(message) from error


def _origin(url: httpx2.URL) -> tuple[str, bytes, int | None]:
    return url.scheme, url.raw_host, url.port
