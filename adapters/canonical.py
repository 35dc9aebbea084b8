"""An adapter in the form the engine loads fastest: a read and a copy.

It is a PEFT folder too, which vLLM's own loader takes: A and B in the engine's dtype, under the
base's own module names and in the base's order, A before B. B is already multiplied by the
module's scaling, and the config says a scaling of 1. vLLM would otherwise round twice, once to its
dtype and once after multiplying; here the product of the numbers as stored is rounded once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from adapters.base import BaseSpec
from adapters.errors import Problem
from adapters.folder import CONFIG, WEIGHTS, disk, open_regular
from adapters.peft import AdapterSpec
from adapters.weights import DTYPE_BYTES, Tensor, numbers

FORMAT = 1  # of the files; another one is written beside what is there
_DTYPES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

Reals = NDArray[np.float32] | NDArray[np.float64]


def key(base: BaseSpec, dtype: str) -> str:
    """Name of the folder for this form: `engine-v1-bf16-` and 12 hex digits.

    It differs for another format, dtype (BF16, F16 or F32) or set of linear layers of the base.
    """
    linears = json.dumps([[path, *shape] for path, shape in base.linears.items()])
    shapes = hashlib.sha256(linears.encode()).hexdigest()[:12]
    return f"engine-v{FORMAT}-{dtype.lower()}-{shapes}"


def write(folder: Path, spec: AdapterSpec, base: BaseSpec, dtype: str, into: Path) -> list[Problem]:
    """Writes the adapter in `folder` for `base` into the empty folder `into`.

    `spec` is `folder` as `peft.read` gave it, and `validate` found nothing wrong with it; `dtype`
    is BF16, F16 or F32. Equal inputs give equal bytes. One tensor is in memory at a time. Where
    modules differ in rank, the config has the largest, which is all that vLLM asks of it.

    Returns a problem, `overflow`, if numbers are too large for `dtype`; what was written is then
    of no use. Raises InvalidAdapter if the weights are shorter than their header, StoreError if
    the disk fails and ValueError for another dtype.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"{dtype} is no dtype of an engine: give {', '.join(_DTYPES)}")
    factors = _factors(spec, base)
    overflown: set[str] = set()
    with disk("write the adapter for the engine"):
        (into / CONFIG).write_bytes(_json(_config(factors), indent=2))
        with open_regular(folder, WEIGHTS) as source, (into / WEIGHTS).open("wb") as target:
            target.write(_header(factors, dtype))
            for factor in factors:
                if not _copy(source, factor, dtype, target):
                    overflown.add(factor.source.name)
    return Problem.grouped(
        "overflow",
        overflown,
        f"Factors with numbers that, scaled, are too large for the engine's {_DTYPES[dtype]}",
        "Train it with a lower learning rate or lora_alpha, or serve the base in another dtype.",
    )


@dataclass(frozen=True, slots=True)
class _Factor:
    """One tensor to write: the numbers of `source` times `scaling`."""

    module: str
    part: str
    source: Tensor
    scaling: float

    @property
    def name(self) -> str:
        return f"base_model.model.{self.module}.lora_{self.part}.weight"


def _factors(spec: AdapterSpec, base: BaseSpec) -> list[_Factor]:
    """In the order they are written."""
    found: dict[str, tuple[_Factor, _Factor]] = {}
    for named, pair in spec.modules.items():
        a, b = pair.tensors
        scaling = spec.scaling(named)
        start = 0
        # The parts of a fused layer share its A, and each has its own rows of B.
        for module in base.fused.get(named, (named,)):
            stop = start + base.linears[module][0]
            part = _rows(b, start, stop)
            found[module] = _Factor(module, "A", a, 1.0), _Factor(module, "B", part, scaling)
            start = stop
    return [factor for module in base.linears for factor in found.get(module, ())]


def _rows(matrix: Tensor, start: int, stop: int) -> Tensor:
    """These rows of a stored matrix, as a tensor of their own in the same file."""
    width = matrix.shape[1]
    row = width * DTYPE_BYTES[matrix.dtype]
    begin, end = matrix.begin + start * row, matrix.begin + stop * row
    return dataclasses.replace(matrix, shape=(stop - start, width), begin=begin, end=end)


# The files ---------------------------------------------------------------------------------


def _json(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent, separators=None if indent else (",", ":")).encode()


def _config(factors: list[_Factor]) -> dict[str, Any]:
    rank = max(factor.source.shape[0] for factor in factors if factor.part == "A")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({factor.module.rpartition(".")[2] for factor in factors}),
        "bias": "none",
    }


def _header(factors: list[_Factor], dtype: str) -> bytes:
    """What comes before the data: its length, and JSON up to a multiple of eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for factor in factors:
        begin, end = end, end + factor.source.elements * DTYPE_BYTES[dtype]
        shape = list(factor.source.shape)
        entries[factor.name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = _json(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy(source: BinaryIO, factor: _Factor, dtype: str, target: BinaryIO) -> bool:
    """Writes one tensor; returns whether all of its numbers fit into `dtype`."""
    values = numbers(source, factor.source)
    scaled = values if factor.scaling == 1 else _product(values, factor.scaling)
    bits, fit = _rounded(scaled, dtype)
    target.write(bits.data)
    return fit


# Numbers -----------------------------------------------------------------------------------

_APART = 24  # bits of a float64 that are multiplied apart: the others' products are exact
_TIES = (1 << 28) - 1  # lower bits of a float64 that is a float32, or half-way between two


def _product(values: NDArray[np.float32], scaling: float) -> NDArray[np.float64]:
    """`values` times `scaling`, rounded to odd where a number of fewer bits, or a tie of them, is
    not exact: rounded to fewer bits it is then what the exact product would be (Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product = values.astype(np.float64) * scaling
    upper = (np.float64(scaling).view(np.int64) >> _APART << _APART).view(np.float64)
    if upper == scaling:  # all are exact
        return product
    at = product.view(np.int64) & _TIES == 0
    some, wide = product[at], values[at].astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        left = (wide * upper - some) + wide * (scaling - upper)  # what rounding took, exactly
    bits, inexact = some.view(np.int64), (left != 0) & np.isfinite(some)
    bits -= inexact & ((left < 0) != (some < 0))  # towards zero
    bits |= inexact
    product[at] = some
    return product


_TIE = np.uint32(0x8000)  # the lower half of a float32 that is between two bfloat16


def _rounded(values: Reals, dtype: str) -> tuple[NDArray[Any], bool]:
    """`values` in `dtype` (bfloat16 as its bits), nearest, ties to even; whether all fit.

    A number does not fit if it is finite and its rounding is not.
    """
    with np.errstate(over="ignore", under="ignore"):
        if dtype == "BF16":
            bits = _bfloat16(values)
            infinite = bits & 0x7FFF == 0x7F80
        else:
            bits = values.astype({"F16": "<f2", "F32": "<f4"}[dtype])
            infinite = np.isinf(bits)
    return bits, not np.any(infinite & np.isfinite(values))


def _bfloat16(values: Reals) -> NDArray[np.uint16]:
    """The bits of `values` as bfloat16, rounded once; NaN stays NaN.

    A float64 goes by way of float32. Its first rounding can only spoil the second where it ends
    on a tie: the float64 then says which side of the tie it came from.
    """
    single = values.astype("<f4")
    bits = single.view("<u4")
    tie = bits & 0xFFFF == _TIE
    if tie.any():
        size, exact = np.abs(single[tie]), np.abs(values[tie])
        bits[tie] += (exact > size).astype("<u4")
        bits[tie] -= (exact < size).astype("<u4")
    lowest = (bits >> 16) & 1
    upper = ((bits + (_TIE - 1) + lowest) >> 16).astype("<u2")
    upper[np.isnan(values)] = 0x7FC0
    return upper
