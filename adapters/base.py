"""The base model's linear layers and size, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import BaseModelError


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """What adapters are measured against.

    `linears` maps module paths as `transformers` names them to (d_out, d_in). `parameters`
    counts tied weights once; `bytes` is the size of the weights on disk.
    """

    name: str
    linears: Mapping[str, tuple[int, int]]
    parameters: int
    bytes: int

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


def _bytes_on_disk(folder: Path) -> int:
    # Some models carry a second copy of their weights under another name (consolidated.*).
    files = list(folder.glob("model*.safetensors")) or list(folder.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)
