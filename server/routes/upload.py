"""A multipart form, streamed to disk: constant memory, and a limit that holds while it arrives."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import anyio.to_thread
from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters.errors import TooLarge
from adapters.folder import CONFIG, disk
from adapters.peft import MAX_CONFIG
from server.errors import BadRequest

MAX_FIELD = 64 * 1024  # bytes of a field that is no file: names and metadata
MAX_PARTS = 64


@dataclass
class Form:
    """What arrived: text fields by name, and uploaded files by field, under their own names."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[Path]] = field(default_factory=dict)


async def receive(request: Request, folder: Path, max_bytes: int) -> Form:
    """Writes the files of a multipart request into `folder`, which is empty; `max_bytes` in all.

    Raises:
        BadRequest: not a multipart form, or one that breaks off, or with two files of one name.
        TooLarge: more than `max_bytes` arrived, or was announced, or a config beyond reason.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise BadRequest(
            "Send the adapter as multipart/form-data with a field `name` and its files in `files` "
            "(or packed, in `archive`)."
        )
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise _too_large(max_bytes)
    parts = _Parts(folder, max_bytes)
    parser = MultipartParser(options[b"boundary"], parts.callbacks())  # type: ignore[arg-type]
    received = 0
    with disk("keep an upload"):
        try:
            async for chunk in request.stream():
                received += len(chunk)
                if received > max_bytes:
                    raise _too_large(max_bytes)
                await anyio.to_thread.run_sync(parser.write, chunk)
            parser.finalize()
        except MultipartParseError as error:
            raise BadRequest(f"The form cannot be read: {error}.") from None
        finally:
            parts.close()
    if not parts.ended:
        raise BadRequest("The form breaks off before its end.")
    return parts.form


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"The upload has more than {max_bytes // 10**6} MB. Save the adapter in bfloat16 or with a "
        "smaller rank, or raise the server's --max-upload-mb."
    )


class _Parts:
    """The parser's callbacks: where in the form it is, and where the bytes go."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.form = Form()
        self.ended = False
        self._folder = folder
        self._max_bytes = max_bytes
        self._parts = 0
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._name = ""
        self._text: bytearray | None = None
        self._file: BinaryIO | None = None
        self._room = 0  # bytes that the file may still have

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._part_begin,
            "on_header_begin": self._header_begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BadRequest(f"The form has more than {MAX_PARTS} parts.")
        self._disposition = b""

    def _header_begin(self) -> None:
        self._header = (bytearray(), bytearray())

    def _header_end(self) -> None:
        if bytes(self._header[0]).lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if b"filename" not in options:
            self._text = bytearray()
            return
        # Only the last component: browsers and SDKs send a path for a file of a folder.
        path = options[b"filename"].decode(errors="replace").replace("\\", "/")
        name = path.rpartition("/")[2]
        if name in ("", ".", "..") or "\0" in name or len(name.encode()) > 255:
            raise BadRequest(f"A file in `{self._name}` has no usable name.", param=self._name)
        target = self._folder / name
        try:
            self._file = target.open("xb")
        except FileExistsError:
            raise BadRequest(f"Two files are called {name}.", param=self._name) from None
        self._room = MAX_CONFIG if name == CONFIG else self._max_bytes
        self.form.files.setdefault(self._name, []).append(target)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._room -= end - start
            if self._room < 0:
                raise TooLarge(f"{CONFIG} has more than {MAX_CONFIG} bytes; PEFT writes thousands.")
            self._file.write(data[start:end])
        elif self._text is not None:
            self._text.extend(data[start:end])
            if len(self._text) > MAX_FIELD:
                raise BadRequest(
                    f"The field `{self._name}` has more than {MAX_FIELD} bytes.", param=self._name
                )

    def _part_end(self) -> None:
        if self._file is not None:
            self.close()
        elif self._text is not None:
            self.form.fields[self._name] = self._text.decode(errors="replace")
            self._text = None

    def _end(self) -> None:
        self.ended = True
