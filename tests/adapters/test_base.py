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


@pytest.mark.parametrize("config", [None, "{}", "nonsense", '{"model_type": "no_such"}'])
def test_folders_without_a_model(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(BaseModelError) as refused:
        BaseSpec.read(tmp_path, "x")
    assert str(tmp_path) in refused.value.message
