"""The singular values of ΔW = s·B·A, from the factors alone.

They say how large an update is and how many directions it really has: by Eckart and Young
(The approximation of one matrix by another of lower rank, 1936), no matrix of rank k is closer
to ΔW than the one that keeps its k largest. ΔW itself, d_out × d_in numbers, is never formed:
with roots of A·Aᵀ and Bᵀ·B, which are r × r, ΔW's values are those of their product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapters.folder import WEIGHTS, open_regular
from adapters.peft import AdapterSpec
from adapters.weights import numbers

# A product smaller than this beside its factors has lost too many digits to a Gram matrix.
_CANCELLED = 1e-3

_Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """The singular values of an update, descending; its energy is the sum of their squares."""

    values: NDArray[np.float64]

    @classmethod
    def joined(cls, spectra: Iterable[Spectrum]) -> Spectrum:
        """Several updates as one: the k-th value is the root of the sum of their k-th squares.

        Its `energy(k)` is what is left of all of them if each keeps its first k directions.
        """
        rows = [spectrum.values for spectrum in spectra]
        total = np.zeros(max(map(len, rows), default=0))
        for row in rows:
            total[: len(row)] = np.hypot(total[: len(row)], row)
        return cls(total)

    @property
    def norm(self) -> float:
        """‖ΔW‖, Frobenius; 0.0 exactly if ΔW is 0."""
        return math.hypot(*self.values)

    @property
    def energies(self) -> NDArray[np.float64]:
        """`energy(k)` for k = 1, 2, …: never falling, and the last is 1."""
        if not self.norm:
            return np.ones(len(self.values))
        sums = np.cumsum(np.square(self.values / self.values[0]))
        return np.asarray(sums / sums[-1], dtype=np.float64)

    def energy(self, k: int) -> float:
        """The share of ‖ΔW‖² in the first `k` directions, 0 to 1; of nothing, all: 1."""
        if not self.norm or k >= len(self.values):
            return 1.0
        return float(self.energies[k - 1]) if k > 0 else 0.0

    def rank_for(self, share: float) -> int:
        """The smallest k whose `energy` is at least `share` (0 to 1); 0 if ΔW is 0."""
        return int(np.searchsorted(self.energies, share)) + 1 if self.norm and share > 0 else 0


def spectrum(a: NDArray[np.float32], b: NDArray[np.float32], scaling: float) -> Spectrum:
    """The spectrum of scaling·B·A for A [r, d_in] and B [d_out, r], all finite.

    It has min(r, d_in, d_out) values. Their squares are right to 1e-7 of the largest one's; a
    product that double precision cannot tell from zero is 0. Takes O(r²·(d_in + d_out)) time, and
    memory for the factors in double precision, in which no float32 squared is too large or small.
    """
    right, left = a.T.astype(np.float64), b.astype(np.float64)
    values = _singular(left, right, _gram_root)
    if math.hypot(*values) < _CANCELLED * np.linalg.norm(left) * np.linalg.norm(right):
        # As with PiSSA saved as plain LoRA: the difference of two products that are almost equal.
        # QR is as exact as the numbers are, but takes several times as long.
        values = _singular(left, right, _qr_root)
        values[values <= _noise(left, right)] = 0.0
    return Spectrum(values[: min(left.shape + right.shape)] * abs(scaling))


def spectra(folder: Path, spec: AdapterSpec) -> dict[str, Spectrum]:
    """The spectrum of each module of `folder` that has both factors, read one at a time.

    For what `validate.check` and `validate.scan` found nothing wrong with. Raises InvalidAdapter
    if the file is shorter than its header says, StoreError if the disk fails.
    """
    found = {}
    with open_regular(folder, WEIGHTS) as file:
        for module, pair in spec.modules.items():
            if pair.a is not None and pair.b is not None:
                a, b = numbers(file, pair.a), numbers(file, pair.b)
                found[module] = spectrum(a, b, spec.scaling(module))
    return found


def _singular(left: _Matrix, right: _Matrix, root: Callable[[_Matrix], _Matrix]) -> _Matrix:
    """Singular values of left·rightᵀ: a root R of X (RᵀR = XᵀX) is X up to a rotation."""
    return np.asarray(np.linalg.svdvals(root(left) @ root(right).T), dtype=np.float64)


def _gram_root(x: _Matrix) -> _Matrix:
    squares, directions = np.linalg.eigh(x.T @ x)
    # Rounding makes some of a singular matrix's zeros negative.
    lengths = np.sqrt(np.maximum(squares, 0))
    return np.asarray(lengths[:, None] * directions.T, dtype=np.float64)


def _qr_root(x: _Matrix) -> _Matrix:
    # numpy's types do not know that this mode gives one matrix.
    return np.asarray(np.linalg.qr(x, mode="r"), dtype=np.float64)


def _noise(left: _Matrix, right: _Matrix) -> float:
    """What rounding can leave of a product that is zero; the factor is `matrix_rank`'s."""
    terms = np.linalg.norm(left, axis=0) @ np.linalg.norm(right, axis=0)
    return float(terms * max(left.shape + right.shape) * np.finfo(np.float64).eps)
