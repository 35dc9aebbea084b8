"""The base model's linear layers and size, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import BaseModelError

# Some models keep these layers as one, their rows one below the other in this order (Phi-3).
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """What adapters are measured against.

    `linears` maps module paths as `transformers` names them to (d_out, d_in). `parameters`
    counts tied weights once; `bytes` is the size of the weights on disk.

    An adapter may have been trained on a model in which some of these layers are one. `fused` maps
    the path of such a layer to those it stands for here; a base that has the layer itself is not
    among them. `shapes` has the (d_out, d_in) of all that an adapter may name: `linears` in their
    order, each fused layer before its first part.
    """

    name: str
    linears: Mapping[str, tuple[int, int]]
    parameters: int
    bytes: int
    fused: Mapping[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)
    shapes: Mapping[str, tuple[int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        fused = _fused(self.linears)
        object.__setattr__(self, "fused", fused)
        object.__setattr__(self, "shapes", _shapes(self.linears, fused))

    @classmethod
    def read(cls, folder: Path, name: str) -> BaseSpec:
        """Builds the model of `folder`'s config.json on the meta device; about a second.

        Raises BaseModelError.
        """
        # Slow imports, which no other part of this package needs.
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            model.tie_weights()
        # transformers raises whatever the model's own code does: no narrower class covers it.
        except Exception as error:
            raise BaseModelError(
                f"The base model in {folder} cannot be understood: {error} "
                "Give a folder with a config.json of a causal language model."
            ) from error
        linears = {
            path: (module.out_features, module.in_features)
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        in_memory = sum(p.numel() * p.element_size() for p in model.parameters())
        return cls(name, linears, model.num_parameters(), _bytes_on_disk(folder) or in_memory)


def _fused(linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[str, ...]]:
    found = {}
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in linears):
        prefix = f"{parent}." if parent else ""
        for name, parts in FUSED.items():
            paths = tuple(prefix + part for part in parts)
            apart = prefix + name not in linears and all(path in linears for path in paths)
            if apart and len({linears[path][1] for path in paths}) == 1:
                found[prefix + name] = paths
    return found


def _shapes(
    linears: Mapping[str, tuple[int, int]], fused: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[int, int]]:
    wholes = {part: whole for whole, parts in fused.items() for part in parts}
    shapes: dict[str, tuple[int, int]] = {}
    for path, shape in linears.items():
        if whole := wholes.get(path):
            rows = sum(linears[part][0] for part in fused[whole])
            shapes.setdefault(whole, (rows, shape[1]))
        shapes[path] = shape
    return shapes


def _bytes_on_disk(folder: Path) -> int:
    # Some models carry a second copy of their weights under another name (consolidated.*).
    files = list(folder.glob("model*.safetensors")) or list(folder.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)
