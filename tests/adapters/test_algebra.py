from __future__ import annotations

import json

from adapters import peft
from adapters.algebra import Layer, algebra
from adapters.base import BaseSpec


def test_the_guides_example():
    layer = Layer("w", d_out=4096, d_in=4096, rank=8, scaling=2.0)
    assert layer.parameters == 65_536
    assert layer.delta_parameters == 16_777_216
    assert f"{layer.as_dict()['reduction']:.1%}" == "99.6%"


def test_the_guides_example_as_an_adapter(make, tmp_path):
    base = BaseSpec("big", {"w": (4096, 4096)}, 2**24, 2**25)
    made = make(rank=8, modules={"w": (4096, 4096)}, target_modules=["w"])
    numbers = algebra(peft.read(made.write(tmp_path)), base).as_dict()
    assert numbers["parameters"] == 65_536
    assert numbers["delta_parameters"] == 16_777_216
    assert f"{numbers['reduction']:.1%}" == "99.6%"
    assert numbers["layers"][0]["scaling"] == 2.0
    assert numbers["base_bytes"] == 2**25
    assert numbers["bytes_share"] == numbers["bytes"] / 2**25
    assert json.loads(json.dumps(numbers)) == numbers


def test_totals_and_order(make, base, tmp_path):
    numbers = algebra(peft.read(make(rank=4).write(tmp_path)), base)
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
    numbers = algebra(peft.read(tmp_path), BaseSpec.read(tiny_llama, "tiny"))
    assert len(numbers.layers) == 2
    for layer in numbers.layers:
        key = f"base_model.model.{layer.module}"
        ours = layer.scaling * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        theirs = model.get_submodule(key).get_delta_weight("default")
        torch.testing.assert_close(ours, theirs)
        assert ours.shape == (layer.d_out, layer.d_in)
