"""What a LoRA adapter is in numbers: ΔW = (α/r)·B·A.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021. A linear layer's update ΔW
is d_out × d_in numbers, of which the adapter keeps r·(d_in + d_out): A is r × d_in, B d_out × r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters.base import BaseSpec
from adapters.peft import AdapterSpec
from adapters.spectrum import Spectrum

_MOST = 0.99  # of the energy


def reduction(parameters: int, delta_parameters: int) -> float:
    """The share of ΔW's numbers that need not be kept, 0 to 1 (negative if r is too large)."""
    return 1 - parameters / delta_parameters if delta_parameters else 0.0


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted module.

    `scaling` is α/r, or α/√r with rsLoRA. `norm` is ‖ΔW‖ (Frobenius), `rank_99` the rank that
    keeps 99 % of its energy, ‖ΔW‖²; both are 0 if ΔW is.
    """

    module: str
    d_out: int
    d_in: int
    rank: int
    scaling: float
    norm: float
    rank_99: int

    @property
    def parameters(self) -> int:
        """Numbers in A and B."""
        return self.rank * (self.d_in + self.d_out)

    @property
    def delta_parameters(self) -> int:
        """Numbers in ΔW."""
        return self.d_in * self.d_out

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the keys are stable."""
        return {
            "module": self.module,
            "d_out": self.d_out,
            "d_in": self.d_in,
            "rank": self.rank,
            "scaling": self.scaling,
            "parameters": self.parameters,
            "delta_parameters": self.delta_parameters,
            "reduction": reduction(self.parameters, self.delta_parameters),
            "norm": self.norm,
            "rank_99": self.rank_99,
        }


@dataclass(frozen=True, slots=True)
class Algebra:
    """An adapter's layers in the base's order, and its weights' bytes beside the base's.

    `norm` is the root of the layers' squared norms: 0.0 for an adapter that changes nothing.
    `energy[k - 1]` is the share of norm² that is left if every layer keeps the k largest of its
    directions, and `rank_99` the smallest k for which that is 99 %.
    """

    layers: tuple[Layer, ...]
    bytes: int
    base_bytes: int
    norm: float
    rank_99: int
    energy: tuple[float, ...]

    @property
    def parameters(self) -> int:
        """Numbers in all A and B."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def delta_parameters(self) -> int:
        """Numbers in all ΔW."""
        return sum(layer.delta_parameters for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the keys are stable. `bytes_share` is bytes / base_bytes.

        `energy` has one share for each k from 1 to the largest rank, rounded to 6 digits.
        """
        return {
            "parameters": self.parameters,
            "delta_parameters": self.delta_parameters,
            "reduction": reduction(self.parameters, self.delta_parameters),
            "bytes": self.bytes,
            "base_bytes": self.base_bytes,
            "bytes_share": self.bytes / self.base_bytes if self.base_bytes else 0.0,
            "norm": self.norm,
            "rank_99": self.rank_99,
            "energy": [round(share, 6) for share in self.energy],
            "layers": [layer.as_dict() for layer in self.layers],
        }


def algebra(spec: AdapterSpec, base: BaseSpec, spectra: Mapping[str, Spectrum]) -> Algebra:
    """The numbers of an adapter that `validate.check` found nothing wrong with.

    `spectra` has one for each of its modules, as `spectrum.spectra` reads them.
    """
    layers = tuple(
        Layer(
            module,
            d_out,
            d_in,
            spec.expected_rank(module),
            spec.scaling(module),
            spectra[module].norm,
            spectra[module].rank_for(_MOST),
        )
        for module, (d_out, d_in) in base.shapes.items()
        if module in spec.modules
    )
    whole = Spectrum.joined(spectra[layer.module] for layer in layers)
    energy = tuple(whole.energies.tolist())
    return Algebra(layers, spec.bytes, base.bytes, whole.norm, whole.rank_for(_MOST), energy)
