from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adapters import peft
from adapters.advice import advise
from adapters.algebra import algebra
from adapters.base import BaseSpec
from adapters.errors import Problem
from adapters.spectrum import spectra

DEMO = Path(peft.__file__).parent / "demo" / "weights"
SIZES = {
    "q_proj": (16, 16),
    "k_proj": (8, 16),
    "v_proj": (8, 16),
    "o_proj": (16, 16),
    "up_proj": (32, 16),
    "down_proj": (16, 32),
}
EVERY = {f"layers.{layer}.{kind}": size for layer in range(2) for kind, size in SIZES.items()}


def advice(folder: Path, modules: dict[str, tuple[int, int]] = EVERY) -> dict[str, Problem]:
    spec = peft.read(folder)
    base = BaseSpec("tiny", modules, 4096, 8192)
    found = advise(spec, algebra(spec, base, spectra(folder, spec)))
    assert len({p.code for p in found}) == len(found)
    assert all(p.where and p.message and p.fix for p in found)
    return {p.code: p for p in found}


@pytest.fixture
def well_made(make):
    """An adapter there is nothing to say about, but for what a test changes."""

    def build(rank: int = 8, dtype: str = "BF16", **config):
        return make(rank, dtype=dtype, modules=EVERY, target_modules=list(SIZES), **config)

    return build


def low_rank(made, directions: int):
    """`made` with energy in the first `directions` of its layers only."""
    for name, (_, given) in made.tensors.items():
        if "lora_B" in name:
            given[:, directions:] = 0
    return made


@pytest.mark.parametrize("task", ["code", "poetry", "sql"])
def test_the_demo_adapters_are_well_made(task):
    spec = peft.read(DEMO / task)
    sizes = {m: (p.b.shape[0], p.a.shape[1]) for m, p in spec.modules.items()}
    assert advice(DEMO / task, sizes) == {}


def test_a_well_made_adapter_gets_no_advice(well_made, tmp_path):
    assert advice(well_made().write(tmp_path)) == {}


# Alpha -------------------------------------------------------------------------------------


def test_alpha_that_is_not_twice_the_rank(well_made, tmp_path):
    found = advice(well_made(lora_alpha=8).write(tmp_path))
    assert list(found) == ["alpha_not_twice_rank"]
    said = found["alpha_not_twice_rank"]
    assert said.where == "lora_alpha"
    assert said.message == (
        "B·A is scaled by lora_alpha / r = 1 at rank 8 (12 of 12 layers); the rule of thumb is "
        "lora_alpha = 2·r, a scale of 2."
    )
    assert "config alone" in said.fix


def test_alpha_of_single_layers(well_made, tmp_path):
    found = advice(well_made(alpha_pattern={"q_proj": 4, "1.k_proj": 20}).write(tmp_path))
    message = found["alpha_not_twice_rank"].message
    assert "0.5 at rank 8 (2 of 12 layers), 2.5 at rank 8 (1 of 12 layers);" in message


def test_patterns_that_keep_the_rule(well_made, tmp_path):
    made = well_made(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 8})
    for name in [n for n in made.tensors if "q_proj" in n]:
        dtype, given = made.tensors[name]
        made.tensors[name] = dtype, given[:4] if "lora_A" in name else given[:, :4].copy()
    assert advice(made.write(tmp_path)) == {}


def test_the_rule_says_nothing_of_rslora(well_made, tmp_path):
    assert advice(well_made(lora_alpha=8, use_rslora=True).write(tmp_path)) == {}


# Rank --------------------------------------------------------------------------------------


def test_a_rank_that_is_hardly_used(well_made, tmp_path):
    folder = low_rank(well_made(rank=16), 4).write(tmp_path)
    found = advice(folder)
    assert list(found) == ["rank_more_than_needed"]
    said = found["rank_more_than_needed"]
    saved = peft.read(folder).bytes * 3 / 4 / 1000
    assert said.where == "r"
    assert "99 % of the energy ‖ΔW‖² is in the 4 largest directions of each layer" in said.message
    assert f"At rank 4 the adapter would take {saved:.1f} kB less." in said.message
    assert said.fix == "Train with r=4 and compare the two."


@pytest.mark.parametrize(("rank", "used"), [(16, 12), (16, 16), (8, 1)])
def test_a_rank_that_is_used_or_small(well_made, tmp_path, rank, used):
    assert advice(low_rank(well_made(rank=rank), used).write(tmp_path)) == {}


def test_one_large_rank_among_small_ones_saves_too_little(well_made, tmp_path):
    made = well_made(rank=8, rank_pattern={"0.k_proj": 32}, alpha_pattern={"0.k_proj": 64})
    rng = np.random.default_rng(0)
    a, b = (f"base_model.model.layers.0.k_proj.lora_{part}.weight" for part in ("A", "B"))
    made.tensors[a] = ("F16", rng.standard_normal((32, 16)).astype("<f2"))
    made.tensors[b] = ("F16", np.zeros((8, 32), "<f2"))
    assert advice(made.write(tmp_path)) == {}


def test_no_rank_is_named_to_an_adapter_that_changes_nothing(well_made, tmp_path):
    assert advice(low_rank(well_made(rank=16), 0).write(tmp_path)) == {}


# Targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kinds", [["q_proj"], ["v_proj"], ["q_proj", "v_proj"], ["query_key_value"]]
)
def test_attentions_inputs_alone(make, tmp_path, kinds):
    modules = {f"layers.0.{kind}": (8, 16) for kind in kinds}
    made = make(rank=8, dtype="BF16", modules=modules, target_modules=kinds)
    found = advice(made.write(tmp_path), modules)
    assert list(found) == ["few_targets"]
    said = found["few_targets"]
    assert said.where == "target_modules" and "all-linear" in said.fix
    assert f"Adapted: {', '.join(kinds)} only" in said.message
    assert "feed-forward" in said.message


@pytest.mark.parametrize("kinds", [["q_proj", "k_proj", "v_proj", "o_proj"], ["q_proj", "up_proj"]])
def test_targets_somebody_thought_about(make, tmp_path, kinds):
    modules = {f"layers.0.{kind}": (16, 16) for kind in kinds}
    made = make(rank=8, dtype="BF16", modules=modules, target_modules=kinds)
    assert advice(made.write(tmp_path), modules) == {}


# Type --------------------------------------------------------------------------------------


def test_float32_could_be_half_the_bytes(well_made, tmp_path):
    made = well_made(dtype="F32")
    found = advice(made.write(tmp_path))
    assert list(found) == ["stored_in_fp32"]
    said = found["stored_in_fp32"]
    saved = sum(given.nbytes for _, given in made.tensors.values()) / 2
    assert said.where == "adapter_model.safetensors"
    assert f"{saved / 1000:.1f} kB less" in said.message


def test_savings_are_said_in_megabytes(make, tmp_path):
    modules = {"layers.0.o_proj": (4096, 4096)}
    made = make(rank=64, modules=modules, target_modules=["o_proj"])
    assert "1.0 MB less" in advice(made.write(tmp_path), modules)["stored_in_fp32"].message


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_is_small_enough(well_made, tmp_path, dtype):
    assert advice(well_made(dtype=dtype).write(tmp_path)) == {}


def test_everything_at_once(make, tmp_path):
    modules = {"layers.0.q_proj": (16, 16)}
    made = low_rank(make(rank=16, modules=modules, target_modules=["q_proj"], lora_alpha=16), 2)
    assert list(advice(made.write(tmp_path), modules)) == [
        "alpha_not_twice_rank",
        "rank_more_than_needed",
        "few_targets",
        "stored_in_fp32",
    ]
