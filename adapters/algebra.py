"""What a LoRA adapter is in numbers: ΔW = (α/r)·B·A.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021. A linear layer's update ΔW
is d_out × d_in numbers, of which the adapter keeps r·(d_in + d_out): A is r × d_in, B d_out × r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapters.base import BaseSpec
from adapters.peft import AdapterSpec


def reduction(parameters: int, delta_parameters: int) -> float:
    """The share of ΔW's numbers that need not be kept, 0 to 1 (negative if r is too large)."""
    return 1 - parameters / delta_parameters if delta_parameters else 0.0


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted module. `scaling` is α/r, or α/√r with rsLoRA."""

    module: str
    d_out: int
    d_in: int
    rank: int
    scaling: float

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
        }


@dataclass(frozen=True, slots=True)
class Algebra:
    """An adapter's layers in the base's order, and its weights' bytes beside the base's."""

    layers: tuple[Layer, ...]
    bytes: int
    base_bytes: int

    @property
    def parameters(self) -> int:
        """Numbers in all A and B."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def delta_parameters(self) -> int:
        """Numbers in all ΔW."""
        return sum(layer.delta_parameters for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the keys are stable. `bytes_share` is bytes / base_bytes."""
        return {
            "parameters": self.parameters,
            "delta_parameters": self.delta_parameters,
            "reduction": reduction(self.parameters, self.delta_parameters),
            "bytes": self.bytes,
            "base_bytes": self.base_bytes,
            "bytes_share": self.bytes / self.base_bytes if self.base_bytes else 0.0,
            "layers": [layer.as_dict() for layer in self.layers],
        }


def algebra(spec: AdapterSpec, base: BaseSpec) -> Algebra:
    """The numbers of an adapter that `validate.check` found nothing wrong with."""
    layers = tuple(
        Layer(module, d_out, d_in, spec.expected_rank(module), spec.scaling(module))
        for module, (d_out, d_in) in base.linears.items()
        if module in spec.modules
    )
    return Algebra(layers, spec.bytes, base.bytes)
