"""Random PEFT adapters for the base: equal set, rank and number mean equal weights.

B is random too, and large enough to change what the base says: an adapter that is not applied
would otherwise be as good as one that is.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.workload import AdapterSet, adapter_names

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPREAD_B = 0.03


def make(base: Path, of_set: str, wanted: AdapterSet, cache: Path) -> dict[str, Path]:
    """Name → PEFT folder of every adapter of the set, made where `cache` does not have it."""
    folders = {
        name: cache / f"{base.name}-rank{wanted.rank}-{seed}"
        for seed, name in enumerate(adapter_names(of_set, wanted.count))
    }
    for seed, folder in enumerate(folders.values()):
        if folder.is_dir():
            continue
        cache.mkdir(parents=True, exist_ok=True)
        # Renamed into place when complete: what an interrupted run left is never used.
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            write(Path(scratch) / "adapter", base, seed, wanted.rank, "bfloat16")
            os.rename(Path(scratch) / "adapter", folder)
    return folders


def write(
    folder: Path,
    base: Path,
    seed: int,
    rank: int,
    dtype: str,
    spread_b: float = SPREAD_B,
    targets: Sequence[str] = LINEARS,
    **more: Any,
) -> None:
    """One adapter in `folder`, as PEFT's save_pretrained writes it; α is twice the rank.

    dtype is torch's name of the weights' type, spread_b B's standard deviation; A keeps the scale
    of its input. `targets` are the linears it is for; more keywords go to LoraConfig.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM", **more
    )
    model = get_peft_model(bare, config, low_cpu_mem_usage=True)
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            spread = spread_b if "lora_B" in name else parameter.shape[-1] ** -0.5
            values = spread * torch.randn(parameter.shape, generator=random)
            weights[name] = values.to(getattr(torch, dtype))
    model.load_state_dict(weights, strict=False, assign=True)
    model.save_pretrained(folder)


def write_plain(folder: Path, shapes: Mapping[str, tuple[int, int]], seed: int, rank: int) -> None:
    """One adapter as `write` does, on the linears of `shapes` (path → d_out, d_in), in bfloat16.

    Without PEFT, which takes a second for each: for sets of a thousand.
    """
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(seed)
    weights = {}
    for path, (wide, deep) in shapes.items():
        for part, shape, spread in (
            ("A", (rank, deep), deep**-0.5),
            ("B", (wide, rank), SPREAD_B),
        ):
            values = spread * torch.randn(shape, generator=random)
            weights[f"base_model.model.{path}.lora_{part}.weight"] = values.bfloat16()
    targets = sorted({path.rpartition(".")[2] for path in shapes})
    config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank},
        **{"target_modules": targets, "bias": "none"},
    }
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
