"""Random PEFT adapters for the base: equal set, rank and number mean equal weights.

B is random too, and large enough to change what the base says: an adapter that is not applied
would otherwise be as good as one that is.
"""

import os
import tempfile
from pathlib import Path

from benchmarks.workload import AdapterSet, adapter_names

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPREAD_B = 0.03


def make(base: Path, of_set: str, wanted: AdapterSet, cache: Path) -> dict[str, Path]:
    """Name → PEFT folder of every adapter of the set, made where `cache` does not have it."""
    folders = {
        name: cache / f"{base.name}-rank{wanted.rank}-{seed}"
        for seed, name in enumerate(adapter_names(of_set, wanted.count))
    }
    missing = {seed: f for seed, f in enumerate(folders.values()) if not f.is_dir()}
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        _make(base, wanted.rank, missing, cache)
    return folders


def _make(base: Path, rank: int, missing: dict[int, Path], cache: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(LINEARS), task_type="CAUSAL_LM"
    )
    model = get_peft_model(bare, config, low_cpu_mem_usage=True)
    for seed, folder in missing.items():
        random = torch.Generator().manual_seed(seed)
        weights = {}
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                spread = SPREAD_B if "lora_B" in name else parameter.shape[-1] ** -0.5
                values = spread * torch.randn(parameter.shape, generator=random)
                weights[name] = values.to(torch.bfloat16)
        model.load_state_dict(weights, strict=False, assign=True)
        # Renamed into place when complete: what an interrupted run left is never used.
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            model.save_pretrained(Path(scratch) / "adapter")
            os.rename(Path(scratch) / "adapter", folder)
