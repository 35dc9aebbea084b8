"""adapter_model.safetensors: a strict reader of its header, and its data in blocks.

The format: eight bytes of little-endian header length, that many bytes of JSON, then the
tensors' data, contiguous.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from adapters import jsontext
from adapters.errors import InvalidAdapter, Problem
from adapters.folder import WEIGHTS, open_regular

# An adapter needs about 130 bytes of header per tensor; this is room for 120,000 of them.
# The format's own limit of 100 MB would cost a gigabyte of memory to parse.
MAX_HEADER = 16 * 2**20
BLOCK = 2**20
# Module paths have about a hundred characters; what reads names need not fear a megabyte.
_MAX_NAME = 512

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}

_RESAVE = "Write the file again with safetensors or PEFT's save_pretrained."


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the header: `begin` and `end` are byte offsets into the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Weights:
    """A checked header: the tensors by name, in name order, and the file's size in bytes."""

    tensors: Mapping[str, Tensor]
    bytes: int


def read(folder: Path) -> Weights:
    """Reads the header of the weights in `folder`, and no tensor data.

    Raises InvalidAdapter with every problem found in the header.
    """
    with open_regular(folder, WEIGHTS) as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _header(file, size)
    return _weights(header, start, size)


def blocks(file: BinaryIO, tensor: Tensor) -> Iterator[bytes]:
    """The data of `tensor` in blocks of whole elements, at most BLOCK bytes each.

    Raises InvalidAdapter if the file has become shorter than its header says.
    """
    file.seek(tensor.begin)
    left = tensor.end - tensor.begin
    while left:
        block = file.read(min(left, BLOCK))
        if len(block) != min(left, BLOCK):
            raise _refusal("weights_truncated", f"{WEIGHTS} ends inside a tensor.", tensor.name)
        left -= len(block)
        yield block


def numbers(file: BinaryIO, tensor: Tensor) -> NDArray[np.float32]:
    """All of `tensor`, of type F32, F16 or BF16, as float32 in its own shape; each is exact.

    Raises InvalidAdapter if the file has become shorter than its header says.
    """
    data = b"".join(blocks(file, tensor))
    if tensor.dtype == "BF16":  # the upper half of a float32
        flat = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        flat = np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[tensor.dtype]).astype("<f4")
    return flat.reshape(tensor.shape)


def _refusal(code: str, message: str, where: str = WEIGHTS) -> InvalidAdapter:
    return InvalidAdapter([Problem(code, where, message, _RESAVE)])


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise _refusal("weights_truncated", f"{WEIGHTS} has {size} bytes and no header.")
    length = int.from_bytes(prefix, "little")
    if length > size - 8:
        raise _refusal(
            "header_length",
            f"{WEIGHTS} says its header has {length} bytes, but only {size - 8} follow.",
        )
    if length > MAX_HEADER:
        raise _refusal(
            "header_length", f"The header of {WEIGHTS} has {length} bytes, over {MAX_HEADER}."
        )
    text = file.read(length)
    try:
        if text[:1] != b"{":
            raise ValueError("it does not begin with '{'")
        return jsontext.parse(text), 8 + length
    except ValueError as error:
        raise _refusal(
            "header_json", f"The header of {WEIGHTS} cannot be read: {error}."
        ) from error


def _weights(header: dict[str, Any], start: int, size: int) -> Weights:
    faults: dict[str, list[str]] = {}
    tensors: dict[str, Tensor] = {}
    if not _is_metadata(header.pop("__metadata__", {})):
        faults["header_metadata"] = ["__metadata__"]
    for name in sorted(header):
        code, tensor = _tensor(name, header[name], start)
        if tensor is None:
            faults.setdefault(code, []).append(name)
        else:
            tensors[name] = tensor
    problems = [
        problem
        for code, names in faults.items()
        for problem in Problem.grouped(code, names, _FAULTS[code], _RESAVE)
    ]
    # With an entry unread, the gaps it leaves would be reported as faults of its neighbours.
    if not problems:
        problems = _layout(tensors, start, size)
    if problems:
        raise InvalidAdapter(problems)
    return Weights(tensors, size)


_FAULTS = {
    "header_metadata": "The header's metadata is not a map of text to text",
    "header_name": f"Tensor names longer than {_MAX_NAME}",
    "header_entry": "Header entries without a usable dtype, shape and data_offsets",
    "header_dtype": "Tensors of a type safetensors does not define here",
    "header_shape": "Tensors whose shape and type do not add up to their bytes",
}


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tensor(name: str, entry: Any, start: int) -> tuple[str, Tensor | None]:
    if len(name) > _MAX_NAME:
        return "header_name", None
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "header_entry", None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and isinstance(dtype, str)
    # No tensor has so many dimensions; products over them would be slow and huge.
    if not lists or len(offsets) != 2 or len(shape) > 16:
        return "header_entry", None
    if not all(map(_is_count, [*shape, *offsets])) or offsets[0] > offsets[1]:
        return "header_entry", None
    if dtype not in DTYPE_BYTES:
        return "header_dtype", None
    if math.prod(shape) * DTYPE_BYTES[dtype] != offsets[1] - offsets[0]:
        return "header_shape", None
    return "", Tensor(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _layout(tensors: Mapping[str, Tensor], start: int, size: int) -> list[Problem]:
    position = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
        if tensor.begin != position:
            kind = "overlaps another" if tensor.begin < position else "leaves a gap before it"
            return [Problem("header_offsets", tensor.name, f"This tensor's data {kind}.", _RESAVE)]
        position = tensor.end
    if position > size:
        message = f"{WEIGHTS} should have {position} bytes and has {size}."
        return [Problem("weights_truncated", WEIGHTS, message, "Copy or upload it again.")]
    if position < size:
        message = f"{WEIGHTS} has {size - position} bytes after its last tensor."
        return [Problem("weights_trailing", WEIGHTS, message, _RESAVE)]
    return []
