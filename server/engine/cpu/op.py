"""The torch op `loraplex::add_lora`: y[row] += B·A·x[row] for every row that has an adapter.

It works on what is set before: the weights in each slot of each layer (`new_layer`, `set_slot`),
and the rows of the running step that belong to each slot (`new_batch`, `set_rows`). Rows of no slot
are neither read nor written. Weights are copied once, by `pack`, in any thread and while steps run;
slots then share that copy, so that filling one takes no time. A layer is a number to the op, so
torch.compile sees one opaque call a layer, and no weights.

There are two forms, one meaning. The compiled one (kernels.cpp, op.cpp) is the fast one;
`Reference` says in torch what it computes, is what tests hold it against, and takes its place where
it was not compiled.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from server.engine.cpu import build

SCHEMA = "add_lora(Tensor(a!) y, Tensor x, int layer) -> ()"


class Op(Protocol):
    """What both forms have."""

    def new_batch(self) -> int:
        """A set of rows that layers can refer to; empty at first."""

    def new_layer(self, slots: int, batch: int) -> int:
        """A layer with so many empty slots, whose rows are those of `batch`."""

    def pack(
        self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], outputs: Sequence[int]
    ) -> int:
        """Copies an adapter of one layer into the order it is read in; returns its number, not 0.

        For slice i of a fused layer a[i] is A [rank, d_in], b[i] Bᵀ [rank, width] with scaling, and
        outputs[i] its first column of y. All of one dtype, any strides. May be called in any
        thread; the compiled form holds neither the interpreter nor torch's threads.
        """

    def free(self, packed: Sequence[int]) -> None:
        """Forgets what was packed; a slot that has it keeps it. Unknown numbers are no error."""

    def packed_bytes(self) -> int:
        """Bytes of all that is packed and not freed."""

    def set_slot(self, layer: int, slot: int, packed: int) -> None:
        """Puts what was packed into a slot of a layer, or with 0 empties it."""

    def set_rows(
        self, batch: int, rows: torch.Tensor, slots: Sequence[int], counts: Sequence[int]
    ) -> None:
        """rows [Σ counts] int32: the first counts[0] of them use slots[0], and so on."""

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, layer: int) -> None:
        """Adds to y [rows, d_out] what the adapters of the batch's rows make of x [rows, d_in].

        bf16, fp16 or fp32, the same in y, x and weights; summed in fp32, rounded once into y.
        """


@dataclass
class _Weights:
    a: torch.Tensor
    b: Sequence[torch.Tensor]
    outputs: Sequence[int]


def add_delta(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """y + x·aᵀ·b, rounded once; y [rows, width], x [rows, d_in], a [rank, d_in], b [rank, …]."""
    return (y.float() + (x.float() @ a.float().T) @ b.float()).to(y.dtype)


class Reference:
    """The op in plain torch."""

    def __init__(self) -> None:
        self._batches: list[list[tuple[int, torch.Tensor]]] = []
        self._layers: list[tuple[int, list[_Weights | None]]] = []
        self._packed: dict[int, _Weights] = {}
        self._numbers = itertools.count(1)

    def new_batch(self) -> int:
        self._batches.append([])
        return len(self._batches) - 1

    def new_layer(self, slots: int, batch: int) -> int:
        self._layers.append((batch, [None] * slots))
        return len(self._layers) - 1

    def pack(
        self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], outputs: Sequence[int]
    ) -> int:
        number = next(self._numbers)
        self._packed[number] = _Weights(torch.cat(list(a)), [_copy(each) for each in b], outputs)
        return number

    def free(self, packed: Sequence[int]) -> None:
        for number in packed:
            self._packed.pop(number, None)

    def packed_bytes(self) -> int:
        kept = [each for w in self._packed.values() for each in (w.a, *w.b)]
        return sum(each.numel() * each.itemsize for each in kept)

    def set_slot(self, layer: int, slot: int, packed: int) -> None:
        self._layers[layer][1][slot] = self._packed[packed] if packed else None

    def set_rows(
        self, batch: int, rows: torch.Tensor, slots: Sequence[int], counts: Sequence[int]
    ) -> None:
        groups = rows.long().split(list(counts))
        self._batches[batch] = list(zip(slots, groups, strict=True))

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, layer: int) -> None:
        batch, slots = self._layers[layer]
        for slot, rows in self._batches[batch]:
            weights = slots[slot]
            if weights is None:
                continue
            inputs = x[rows]
            for first, a, b in zip(weights.outputs, _split(weights), weights.b, strict=True):
                columns = slice(first, first + b.shape[1])
                y[rows, columns] = add_delta(y[rows, columns], inputs, a, b)


def _copy(b: torch.Tensor) -> torch.Tensor:
    return b.clone(memory_format=torch.contiguous_format)


def _split(weights: _Weights) -> Sequence[torch.Tensor]:
    slices: Sequence[torch.Tensor] = weights.a.split([b.shape[0] for b in weights.b])
    return slices


def _no_output(y: torch.Tensor, x: torch.Tensor, layer: int) -> None:
    """What torch.compile needs to know of the op: it returns nothing and changes y."""


@dataclass
class _Installed:
    op: Op
    library: torch.library.Library
    why: str = ""


_installed: _Installed | None = None


def install(compiled: bool = True) -> Op:
    """Registers `loraplex::add_lora` in this process, the first time, and returns its form.

    `compiled=False` takes the form in torch even where the other has been built.
    """
    global _installed
    if _installed is None:
        library = torch.library.Library("loraplex", "FRAGMENT")
        library.define(SCHEMA)
        torch.library.register_fake("loraplex::add_lora", _no_output, lib=library)
        _installed = _load(library) if compiled else _in_torch(library, "asked for")
    return _installed.op


def _load(library: torch.library.Library) -> _Installed:
    if not build.library().exists():
        return _in_torch(library, "it was not compiled")
    try:
        torch.ops.load_library(build.library())
    except OSError as error:
        return _in_torch(library, str(error.__cause__ or error))  # torch names only the file
    return _Installed(torch.ops.loraplex, library)


def _in_torch(library: torch.library.Library, why: str) -> _Installed:
    op = Reference()
    library.impl("add_lora", op.add_lora, "CPU")
    return _Installed(op, library, why)


def form() -> str:
    """What `install` took: `torch`, or the compiled form's instruction set, e.g. `avx512`."""
    return "torch" if isinstance(install(), Reference) else instruction_sets()[0]


def why() -> str:
    """Why it is the form in torch, if it is."""
    return _installed.why if _installed else ""


def instruction_sets() -> list[str]:
    """What the compiled form can use here, best first."""
    return list(torch.ops.loraplex.instruction_sets())
