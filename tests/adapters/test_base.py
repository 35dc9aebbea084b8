from __future__ import annotations

import pytest

from adapters.base import BaseSpec
from adapters.errors import BaseModelError


def test_linear_layers_and_size_of_a_llama(tiny_llama, peft_model):
    base = BaseSpec.read(tiny_llama, "tiny")
    assert base.linears["model.layers.1.self_attn.k_proj"] == (16, 32)
    assert base.linears["model.layers.0.mlp.down_proj"] == (32, 48)
    assert base.linears["lm_head"] == (64, 32)
    assert len(base.linears) == 2 * 7 + 1
    built = peft_model(target_modules=["q_proj"], r=1).get_base_model()
    real = sum(p.numel() for n, p in built.named_parameters() if "lora_" not in n)
    assert base.parameters == real
    assert base.bytes in (2 * real, 4 * real)


def test_bytes_are_those_on_disk(tiny_llama, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    for name, size in (("model-1.safetensors", 10), ("model-2.safetensors", 20), ("other.bin", 7)):
        (tmp_path / name).write_bytes(b"\0" * size)
    (tmp_path / "consolidated.safetensors").write_bytes(b"\0" * 30)
    assert BaseSpec.read(tmp_path, "tiny").bytes == 30


def test_a_tied_output_layer_counts_once(tiny_llama, tmp_path):
    import json

    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tied, untied = BaseSpec.read(tmp_path, "tied"), BaseSpec.read(tiny_llama, "untied")
    assert untied.parameters - tied.parameters == 64 * 32


def spec(*paths: str, **shapes: tuple[int, int]) -> BaseSpec:
    """A base of these linear layers, 8 × 16 unless another shape is given by last component."""
    linears = {path: shapes.get(path.rpartition(".")[2], (8, 16)) for path in paths}
    return BaseSpec("x", linears, 1, 1)


def test_fused_layers_of_a_llama(tiny_llama):
    base = BaseSpec.read(tiny_llama, "tiny")
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert len(base.fused) == 2 * 2
    assert base.fused[f"{attention}.qkv_proj"] == tuple(f"{attention}.{p}_proj" for p in "qkv")
    assert base.fused[f"{mlp}.gate_up_proj"] == (f"{mlp}.gate_proj", f"{mlp}.up_proj")
    assert base.shapes[f"{attention}.qkv_proj"] == (32 + 16 + 16, 32)
    assert base.shapes[f"{mlp}.gate_up_proj"] == (96, 32)
    assert {m: base.shapes[m] for m in base.linears} == base.linears
    assert base.shapes.keys() == base.linears.keys() | base.fused.keys()
    order = [m.rpartition(".")[2] for m in base.shapes if m.startswith("model.layers.0.")]
    assert order == [
        "qkv_proj",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_up_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]


def test_layers_that_do_not_make_a_fused_one():
    qkv = ("a.q_proj", "a.k_proj", "a.v_proj")
    assert spec(*qkv).fused == {"a.qkv_proj": qkv}
    assert spec(*qkv, v_proj=(4, 16)).shapes["a.qkv_proj"] == (20, 16)
    assert spec("q_proj", "k_proj", "v_proj").fused == {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    assert spec(*qkv, v_proj=(8, 12)).fused == {}  # not of the same input
    assert spec("a.q_proj", "a.k_proj").fused == {}
    assert spec("a.q_proj", "a.k_proj", "b.v_proj").fused == {}
    assert spec("a.qkv_proj", "a.o_proj").fused == {}
    assert spec(*qkv, "a.qkv_proj").fused == {}


@pytest.mark.parametrize("config", [None, "{}", "nonsense", '{"model_type": "no_such"}'])
def test_folders_without_a_model(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(BaseModelError) as refused:
        BaseSpec.read(tmp_path, "x")
    assert str(tmp_path) in refused.value.message
