"""Object storage: S3, Google Cloud Storage and Azure Blob Storage, and what speaks like them.

Endpoints and credentials come from the server's environment (AWS_…, GOOGLE_…, AZURE_…), never
from an address.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import obstore
from obstore.exceptions import (
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, ObjectStore, S3Store

from adapters.errors import SourceFailed, SourceForbidden, SourceNotFound
from adapters.sources.address import Address
from adapters.sources.intake import Transfer
from adapters.sources.remote import Dropped, RemoteFile, ask, take

TIMEOUT_S = 10  # to connect, and between two blocks

_STORES: dict[str, tuple[Callable[..., ObjectStore], str]] = {
    "s3": (S3Store, "AWS_"),
    "gs": (GCSStore, "GOOGLE_"),
    "az": (AzureStore, "AZURE_"),
}
_REQUEST_TIMEOUT_S = 600  # a whole one, body included; what it cuts off is gone on with
_ASKED = re.compile(r"Error performing [A-Z]+ (\S+)")
_STATUS = re.compile(r"status code: (\d{3})")
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_CLASSES: dict[type[Exception], int] = {
    FileNotFoundError: 404,
    PermissionDeniedError: 403,
    UnauthenticatedError: 401,
    PreconditionError: 412,
}


def fetch(address: Address, into: Path, transfer: Transfer, allow_pickle: bool = False) -> str:
    """Downloads the adapter at `address` into the folder `into`; the address again.

    A failure leaves no file. Raises SourceNotFound, SourceForbidden, SourceFailed,
    InvalidAdapter, StoreError and what `transfer` raises.
    """
    with _plainly(address):
        store = _store(address)
    files = ask(partial(_files, store, address), transfer)
    take(files, into, transfer, allow_pickle)
    return str(address)


def _store(address: Address) -> ObjectStore:
    make, _ = _STORES[address.scheme]
    # As `client_options` these would put aside the environment's own (proxy, certificates).
    limits = {
        "connect_timeout": f"{TIMEOUT_S}s",
        "read_timeout": f"{TIMEOUT_S}s",
        "timeout": f"{_REQUEST_TIMEOUT_S}s",
    }
    # Its own retries would neither hear a stop nor know a time limit.
    return make(address.place, config=cast(Any, limits), retry_config={"max_retries": 0})


def _files(store: ObjectStore, address: Address) -> list[RemoteFile]:
    with _plainly(address):
        listed = obstore.list_with_delimiter(store, address.folder or None)["objects"]
    if not listed:
        raise _answer(address, 404)
    return [
        RemoteFile(
            entry["path"].rpartition("/")[2],
            entry["size"],
            _Object(store, entry["path"], address).read,
        )
        for entry in listed
    ]


class _Object:
    """One object, read in pieces that are all of the same state of it."""

    def __init__(self, store: ObjectStore, path: str, address: Address) -> None:
        self._store = store
        self._path = path
        self._address = address
        self._etag: str | None = None

    def read(self, begin: int) -> Generator[bytes, None, None]:
        """The bytes from `begin` on. Raises Dropped, SourceFailed if it changed meanwhile, …"""
        options: obstore.GetOptions = {}
        if begin:
            options["range"] = {"offset": begin}
        if self._etag is not None:
            options["if_match"] = self._etag
        with _plainly(self._address):
            result = obstore.get(self._store, self._path, options=options)
            etag = result.meta["e_tag"]
            # Not every store knows if_match.
            if self._etag not in (None, etag):
                raise _changed(self._address)
            self._etag = etag
            # What it would gather into larger blocks is lost with the connection.
            yield from result.stream(min_chunk_size=1)


@contextmanager
def _plainly(address: Address) -> Iterator[None]:
    """The library's errors as ours. Their text is kept back: it can have credentials in it."""
    try:
        yield
    except (FileNotFoundError, BaseError, ValueError) as error:
        raise _failure(address, error) from None
    except BaseException as error:
        # What an endpoint that is no URL leads to; the class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise _unaskable(address) from None


def _failure(address: Address, error: Exception) -> Exception:
    """What to raise for an `error` of the library."""
    text = str(error)
    if (asked := _ASKED.search(text)) and address.place not in asked[1]:
        # It was not the store but a service of the cloud's that gives credentials out.
        return SourceForbidden(
            f"There are no credentials for {address}. Set them in the server's environment "
            f"({_variables(address)}…)."
        )
    status = _status(error, text)
    if status is not None:
        return _answer(address, status)
    if "builder error" in text:
        return SourceFailed(
            "The store's endpoint is not https. If that is meant, set "
            f"{_variables(address)}ALLOW_HTTP=true for the server."
        )
    if "HTTP error" in text:
        return Dropped("the store's connection was lost or not had")
    return _unaskable(address)


def _answer(address: Address, status: int) -> Exception:
    """What to raise for an HTTP `status` that is no success."""
    if status in (401, 403):
        return SourceForbidden(
            f"The store refuses {address} to the server. Check the credentials in its environment "
            f"({_variables(address)}…)."
        )
    if status == 404:
        return SourceNotFound(f"There is nothing at {address}. Check the address.")
    if status == 412:
        return _changed(address)
    if status in _BUSY:
        return Dropped(f"the store answers with {status}")
    return SourceFailed(f"The store answers with {status} for {address}. Check the address.")


def _status(error: Exception, text: str) -> int | None:
    """The HTTP status behind `error`: in its class where an object was asked for, or in `text`."""
    for kind, status in _CLASSES.items():
        if isinstance(error, kind):
            return status
    found = _STATUS.search(text)
    return int(found[1]) if found else None


def _unaskable(address: Address) -> SourceFailed:
    return SourceFailed(
        f"The store cannot be asked for {address}. Check the server's environment "
        f"({_variables(address)}…)."
    )


def _variables(address: Address) -> str:
    return _STORES[address.scheme][1]


def _changed(address: Address) -> SourceFailed:
    return SourceFailed(f"{address} changed while it was read. Ask again.")
