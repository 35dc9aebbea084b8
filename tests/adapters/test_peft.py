from __future__ import annotations

import json
import math

import pytest

from adapters import peft
from adapters.errors import InvalidAdapter


def test_what_save_pretrained_writes(peft_model, tmp_path):
    model = peft_model(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "up_proj"])
    model.save_pretrained(tmp_path)
    spec = peft.read(tmp_path)
    assert (spec.rank, spec.alpha, spec.rslora, spec.peft_type) == (8, 16.0, False, "LORA")
    assert spec.target_modules == ("q_proj", "up_proj")
    assert spec.dtype == "F32"
    assert spec.faults == () and spec.unknown == ()
    assert set(spec.modules) == {
        f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.up_proj")
    }
    up = spec.modules["model.layers.0.mlp.up_proj"]
    assert (up.a.shape, up.b.shape) == ((8, 32), (48, 8))
    assert spec.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert spec.bytes == (tmp_path / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scalings_are_those_of_peft(peft_model, tmp_path, rslora):
    from peft import PeftModel

    model = peft_model(
        r=4,
        lora_alpha=12,
        use_rslora=rslora,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 6, "q_proj": 2, r".*\.1\.mlp\..*": 3},
        alpha_pattern={"v_proj": 5, "^model.layers.1.self_attn.v_proj": 99},
    )
    model.save_pretrained(tmp_path)
    # Saving sorts the patterns, and the first that matches wins: only what is loaded counts.
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    spec = peft.read(tmp_path)
    compared = 0
    for path, module in loaded.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            assert spec.expected_rank(path) == module.r["default"]
            assert spec.scaling(path) == pytest.approx(module.scaling["default"], rel=1e-12)
            assert spec.modules[path].a.shape[0] == module.r["default"]
            compared += 1
    assert compared == len(spec.modules) == 6


def test_config_values_of_the_wrong_type_are_all_named(make, tmp_path):
    made = make(
        r="eight",
        lora_alpha=True,
        target_modules=3,
        rank_pattern={"q_proj": 0},
        use_rslora="yes",
        peft_type=7,
        layers_to_transform="all",
        alpha_pattern={"(a+)+": 1},
    )
    faults = peft.read(made.write(tmp_path)).faults
    assert {(f.code, f.where) for f in faults} == {
        ("config_value", "r"),
        ("config_value", "lora_alpha"),
        ("config_value", "target_modules"),
        ("config_value", "rank_pattern"),
        ("config_value", "use_rslora"),
        ("config_value", "peft_type"),
        ("config_value", "layers_to_transform"),
        ("config_pattern", "alpha_pattern"),
    }


def test_missing_config_keys(make, tmp_path):
    made = make()
    made.config = {"bias": "none"}
    faults = peft.read(made.write(tmp_path)).faults
    assert {f.where for f in faults} == {"r", "lora_alpha", "target_modules", "peft_type"}
    assert {f.code for f in faults} == {"config_key_missing"}


def test_nulls_are_peft_defaults(make, tmp_path):
    spec = peft.read(make(rank_pattern=None, use_rslora=None, alpha_pattern=None).write(tmp_path))
    assert spec.faults == ()
    assert math.isclose(spec.scaling("model.layers.0.self_attn.q_proj"), 2.0)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{", b'{"r":1,"r":2}', b"\xff", b"[" * 10_000, b'{"a":"' + b"x" * 2**20 + b'"}'],
)
def test_unreadable_configs(make, tmp_path, text):
    make().write(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(InvalidAdapter) as refused:
        peft.read(tmp_path)
    assert [p.code for p in refused.value.problems] == ["config_json"]


def test_both_files_are_judged_at_once(tmp_path):
    (tmp_path / "adapter_config.json").write_text("nonsense")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InvalidAdapter) as refused:
        peft.read(tmp_path)
    assert [p.code for p in refused.value.problems] == ["config_json", "header_length"]
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InvalidAdapter) as refused:
        peft.read(tmp_path)
    assert [p.code for p in refused.value.problems] == ["config_missing", "pickle_refused"]
    assert "weights_only=True" in refused.value.problems[1].fix
    assert "{k: v" in refused.value.problems[1].fix


def test_the_conversion_in_the_refusal_works(make, tmp_path):
    import shlex
    import subprocess
    import sys

    import torch
    from safetensors.torch import load_file

    folder = make().write(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InvalidAdapter) as refused:
        peft.read(folder)
    _, _, command = refused.value.problems[0].fix.partition("trust it: ")
    _, *arguments = shlex.split(command)
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True)
    assert load_file(folder / "adapter_model.safetensors").keys() == tensors.keys()
    assert peft.read(folder).rank == 4


def test_a_linked_config_is_not_followed(make, tmp_path):
    folder = make().write(tmp_path / "a")
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"r": 1}))
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(secret)
    with pytest.raises(InvalidAdapter) as refused:
        peft.read(folder)
    assert [p.code for p in refused.value.problems] == ["not_a_regular_file"]
