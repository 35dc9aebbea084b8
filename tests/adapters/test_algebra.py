from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from adapters import peft
from adapters.algebra import Algebra, Layer, algebra
from adapters.base import BaseSpec
from adapters.spectrum import spectra


def measure(folder: Path, base: BaseSpec) -> Algebra:
    spec = peft.read(folder)
    return algebra(spec, base, spectra(folder, spec))


def factor(made, module: str, part: str) -> np.ndarray:
    return made.tensors[f"base_model.model.{module}.lora_{part}.weight"][1]


def test_the_guides_example():
    layer = Layer("w", d_out=4096, d_in=4096, rank=8, scaling=2.0, norm=1.0, rank_99=8)
    assert layer.parameters == 65_536
    assert layer.delta_parameters == 16_777_216
    assert f"{layer.as_dict()['reduction']:.1%}" == "99.6%"


def test_the_guides_example_as_an_adapter(make, tmp_path):
    base = BaseSpec("big", {"w": (4096, 4096)}, 2**24, 2**25)
    made = make(rank=8, modules={"w": (4096, 4096)}, target_modules=["w"])
    numbers = measure(made.write(tmp_path), base).as_dict()
    assert numbers["parameters"] == 65_536
    assert numbers["delta_parameters"] == 16_777_216
    assert f"{numbers['reduction']:.1%}" == "99.6%"
    assert numbers["layers"][0]["scaling"] == 2.0
    assert numbers["base_bytes"] == 2**25
    assert numbers["bytes_share"] == numbers["bytes"] / 2**25
    assert json.loads(json.dumps(numbers)) == numbers


def test_totals_and_order(make, base, tmp_path):
    numbers = measure(make(rank=4).write(tmp_path), base)
    assert [layer.module for layer in numbers.layers] == [m for m in base.linears if m != "lm_head"]
    assert numbers.parameters == 2 * (4 * (16 + 16) + 4 * (16 + 8))
    assert numbers.delta_parameters == 2 * (16 * 16 + 8 * 16)


def test_delta_w_is_what_peft_adds(peft_model, tiny_llama, tmp_path):
    import torch
    from safetensors.torch import load_file

    model = peft_model(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["k_proj"], alpha_pattern={"1.*": 3}
    )
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    numbers = measure(tmp_path, BaseSpec.read(tiny_llama, "tiny"))
    assert len(numbers.layers) == 2
    for layer in numbers.layers:
        key = f"base_model.model.{layer.module}"
        ours = layer.scaling * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        theirs = model.get_submodule(key).get_delta_weight("default")
        torch.testing.assert_close(ours, theirs)
        assert ours.shape == (layer.d_out, layer.d_in)
        assert layer.norm == pytest.approx(theirs.norm().item(), rel=1e-5)


def test_norm_and_energy_are_those_of_delta_w(make, base, tmp_path):
    made = make(rank=4, alpha_pattern={"v_proj": 1}, lora_alpha=6)
    numbers = measure(made.write(tmp_path), base)
    squares = np.zeros(4)
    for layer in numbers.layers:
        product = factor(made, layer.module, "B") @ factor(made, layer.module, "A")
        values = np.linalg.svd(layer.scaling * product, compute_uv=False)[:4]
        squares += values**2
        assert layer.norm == pytest.approx(np.linalg.norm(values), rel=1e-5)
        shares = np.cumsum(values**2) / np.sum(values**2)
        assert layer.rank_99 == int(np.argmax(shares >= 0.99)) + 1
    assert numbers.norm == pytest.approx(math.sqrt(squares.sum()), rel=1e-5)
    np.testing.assert_allclose(numbers.energy, np.cumsum(squares) / squares.sum(), rtol=1e-5)
    assert numbers.energy[numbers.rank_99 - 1] >= 0.99


def test_the_ranks_that_keep_99_percent(make, base, tmp_path):
    made = make(rank=4)
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"):
        factor(made, module, "B")[:, 1:] = 0
    factor(made, "model.layers.1.self_attn.q_proj", "B")[:, 3:] = 0
    factor(made, "model.layers.1.self_attn.v_proj", "B")[:] = 0
    numbers = measure(made.write(tmp_path), base)
    assert [layer.rank_99 for layer in numbers.layers] == [1, 1, 3, 0]
    assert numbers.rank_99 == 3
    assert numbers.energy[0] < numbers.energy[1] < numbers.energy[2] == pytest.approx(1)
    assert numbers.layers[3].norm == 0.0 < numbers.norm


def test_layers_of_different_ranks(make, base, tmp_path):
    made = make(rank=4, rank_pattern={"v_proj": 2})
    for name in [n for n in made.tensors if "v_proj" in n]:
        dtype, given = made.tensors[name]
        made.tensors[name] = dtype, given[:2] if "lora_A" in name else given[:, :2].copy()
    assert len(measure(made.write(tmp_path), base).energy) == 4


@pytest.mark.parametrize("config", [{}, {"lora_alpha": 0}])
def test_an_adapter_that_changes_nothing(make, base, tmp_path, config):
    made = make(rank=4, **config)
    if not config:
        for module in base.linears:
            if module != "lm_head":
                factor(made, module, "B")[:] = 0
    numbers = measure(made.write(tmp_path), base)
    assert numbers.norm == 0.0 and numbers.rank_99 == 0
    json.dumps(numbers.as_dict(), allow_nan=False)


def test_numbers_of_any_size_are_json(make, base, tmp_path):
    made = make(rank=4, lora_alpha=9e29)
    for _, given in made.tensors.values():
        given[:] = np.finfo("f4").max
    numbers = measure(made.write(tmp_path), base).as_dict()
    json.dumps(numbers, allow_nan=False)
    assert numbers["energy"] == [1.0] * 4 and numbers["rank_99"] == 1


def test_the_keys_are_stable(make, base, tmp_path):
    numbers = measure(make().write(tmp_path), base).as_dict()
    # fmt: off
    assert list(numbers) == [
        "parameters", "delta_parameters", "reduction", "bytes", "base_bytes", "bytes_share",
        "norm", "rank_99", "energy", "layers",
    ]
    assert list(numbers["layers"][0]) == [
        "module", "d_out", "d_in", "rank", "scaling", "parameters", "delta_parameters",
        "reduction", "norm", "rank_99",
    ]
    # fmt: on
    assert numbers["energy"][-1] == 1.0
    assert all(share == round(share, 6) for share in numbers["energy"])
