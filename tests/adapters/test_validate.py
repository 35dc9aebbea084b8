from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters import peft, validate
from adapters.base import BaseSpec
from adapters.errors import InvalidAdapter, Problem

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
V1 = "base_model.model.model.layers.1.self_attn.v_proj"


@pytest.fixture
def report(base, tmp_path):
    def check(made, max_rank=8):
        return validate.check(peft.read(made.write(tmp_path)), base, max_rank)

    return check


def codes(report) -> list[str]:
    return [p.code for p in report.problems]


def test_a_good_adapter(make, report):
    assert report(make()) == validate.Report((), ())


def test_a_real_adapter(peft_model, tiny_llama, tmp_path):
    peft_model(r=4, target_modules="all-linear", layers_to_transform=None).save_pretrained(tmp_path)
    found = validate.check(peft.read(tmp_path), BaseSpec.read(tiny_llama, "tiny"), 4)
    assert found.problems == ()
    assert not {w.code for w in found.warnings} - {"base_model_differs"}


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("peft_type", "IA3", "peft_type"),
        ("use_dora", True, "dora"),
        ("lora_bias", True, "lora_bias"),
        ("bias", "all", "bias"),
        ("bias", "lora_only", "bias"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("alora_invocation_tokens", [1, 2], "alora"),
        ("layer_replication", [[0, 1], [0, 1]], "layer_replication"),
        ("use_bdlora", {}, "bdlora"),
        ("use_qalora", True, "qalora"),
        ("megatron_config", {"a": 1}, "megatron"),
        ("trainable_token_indices", [3], "trainable_tokens"),
        ("target_parameters", ["experts.up"], "target_parameters"),
        ("arrow_config", {}, "arrow"),
        ("kasa_config", {"beta": 1}, "kasa"),
        ("velora_config", {}, "velora"),
        ("monteclora_config", {}, "monteclora"),
        ("init_lora_weights", "pissa", "init_pissa"),
        ("init_lora_weights", "pissa_niter_4", "init_pissa"),
        ("init_lora_weights", "olora", "init_olora"),
        ("init_lora_weights", "corda", "init_corda"),
        ("init_lora_weights", "loftq", "init_loftq"),
        ("init_lora_weights", "brand_new", "init_unsupported"),
        ("init_lora_weights", {}, "init_unsupported"),
    ],
)
def test_features_that_cannot_be_served(make, report, key, value, code):
    found = report(make(**{key: value}))
    assert codes(found) == [code]
    assert found.problems[0].where == key
    assert found.problems[0].fix


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "lora_ga"])
def test_inits_that_leave_the_base_alone(make, report, init):
    assert codes(report(make(init_lora_weights=init))) == []


def test_every_key_of_peft_is_known(make, report):
    from peft import LoraConfig

    written = json.loads(json.dumps(LoraConfig(target_modules=["q_proj"]).to_dict(), default=list))
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    assert fields <= validate._UNDERSTOOD | validate._FEATURES.keys()
    assert set(written) <= validate._UNDERSTOOD | validate._FEATURES.keys()


def renamed(made, old, new):
    made.tensors[new] = made.tensors.pop(old)
    return made


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (f"{Q0}.lora_A.default.weight", "adapter_name_in_key"),
        (f"{Q0}.lora_magnitude_vector", "dora"),
        (f"{Q0}.lora_B.bias", "lora_bias"),
        (f"{Q0}.lora_diag", "kasa"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding_lora"),
        ("base_model.model.lm_head.weight", "embedding_weights"),
        ("base_model.model.model.embed_tokens.base_layer.weight", "embedding_weights"),
        (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            "trainable_tokens",
        ),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "tensor_prefix"),
        ("what\nis\x1bthis", "unknown_tensor"),
    ],
)
def test_tensors_that_are_no_factor(make, report, name, code):
    made = make()
    made.tensors[name] = ("F32", np.ones((4, 16), "<f4"))
    found = report(made)
    assert codes(found) == [code]
    assert found.problems[0].where.isprintable()


def test_output_and_embedding_layers(make, report):
    made = make(modules={"lm_head": (64, 16)}, target_modules=["lm_head"])
    assert codes(report(made)) == ["embedding_lora"]


def test_pairs_and_ranks(make, report):
    made = make()
    del made.tensors[f"{Q0}.lora_B.weight"]
    made.tensors[f"{V1}.lora_B.weight"] = ("F32", np.ones((8, 3), "<f4"))
    found = report(made)
    assert codes(found) == ["factor_missing", "rank_inconsistent"]
    assert found.problems[0].where == "model.layers.0.self_attn.q_proj.lora_B"


def test_ranks_against_the_config_and_the_maximum(make, report):
    assert codes(report(make(rank=4, r=2))) == ["rank_not_as_configured"]
    assert codes(report(make(rank=9))) == ["rank_above_max"]
    assert codes(report(make(rank=4, rank_pattern={"k_proj": 64}))) == ["rank_above_max"]
    assert codes(report(make(rank=8))) == []
    pattern = {"layers.0.self_attn.q_proj": 6}
    assert codes(report(make(rank=4, rank_pattern=pattern))) == ["rank_not_as_configured"]
    assert codes(report(make(rank=6, r=4, rank_pattern={"[qv]_proj": 6}))) == []


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (np.ones(16, "<f4"), ["not_a_matrix"]),
        (np.ones((4, 16, 1), "<f4"), ["not_a_matrix"]),
        (np.ones((0, 16), "<f4"), ["not_a_matrix", "rank_inconsistent"]),
        (np.ones((4, 15), "<f4"), ["shape_mismatch"]),
        (np.ones((16, 4), "<f4"), ["rank_inconsistent", "rank_above_max", "shape_mismatch"]),
    ],
)
def test_shapes(make, report, numbers, expected):
    made = make()
    made.tensors[f"{Q0}.lora_A.weight"] = ("F32", numbers)
    assert codes(report(made)) == expected


def test_b_is_compared_with_the_outputs(make, report):
    made = make()
    made.tensors[f"{V1}.lora_B.weight"] = ("F32", np.ones((16, 4), "<f4"))
    assert codes(report(made)) == ["shape_mismatch"]


def test_modules_of_another_model(make, report):
    elsewhere = {f"transformer.h.{i}.attn.c_attn": (48, 16) for i in range(300)}
    found = report(make(modules=elsewhere, target_modules=["c_attn"]))
    assert codes(found) == ["module_not_in_base", "target_not_in_base"]
    assert "None of the adapter's modules" in found.problems[0].message
    assert "297 more" in found.problems[0].message
    assert len(found.problems[0].message) < 400
    some = {**elsewhere, "model.layers.0.self_attn.q_proj": (16, 16)}
    found = report(make(modules=some, target_modules=["c_attn", "q_proj"]))
    assert codes(found) == ["module_not_in_base", "target_not_in_base"]
    assert "None" not in found.problems[0].message


def test_targets_and_tensors_must_agree(make, report):
    assert codes(report(make(target_modules=["q_proj"]))) == ["tensor_outside_targets"]
    assert codes(report(make(target_modules=["q_proj", "v_proj", "nowhere"]))) == [
        "target_not_in_base"
    ]
    only_q = {"model.layers.0.self_attn.q_proj": (16, 16)}
    assert codes(report(make(modules=only_q))) == ["target_without_tensors"]
    assert codes(report(make(target_modules=r".*\.nowhere"))) == [
        "tensor_outside_targets",
        "target_not_in_base",
    ]
    assert codes(report(make(target_modules="(a+)+")))[:1] == ["config_pattern"]
    assert codes(report(make(exclude_modules=["v_proj"]))) == ["tensor_outside_targets"]
    assert codes(report(make(target_modules="all-linear"))) == []
    assert codes(report(make(target_modules=r".*\.(q|v)_proj"))) == []


def test_layers_to_transform(make, report):
    first = {m: s for m, s in {"q_proj": (16, 16), "v_proj": (8, 16)}.items()}
    modules = {f"model.layers.1.self_attn.{m}": s for m, s in first.items()}
    assert report(make(modules=modules, layers_to_transform=[1])) == validate.Report((), ())
    assert codes(report(make(layers_to_transform=1))) == ["tensor_outside_targets"]


# Adapters of a model with fused layers ------------------------------------------------------

APART = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}
FUSED = {
    "self_attn.qkv_proj": (32, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_up_proj": (48, 16),
    "mlp.down_proj": (16, 24),
}


def layers(shapes, *numbers, only=""):
    return {f"model.layers.{n}.{m}": s for n in numbers for m, s in shapes.items() if only in m}


@pytest.fixture
def against(tmp_path):
    def check(made, shapes):
        linears = {**layers(shapes, 0, 1, 2), "lm_head": (64, 16)}
        return validate.check(peft.read(made.write(tmp_path)), BaseSpec("tiny", linears, 1, 1), 8)

    return check


GOOD = validate.Report((), ())


@pytest.mark.parametrize("shapes", [APART, FUSED], ids=["apart", "fused"])
@pytest.mark.parametrize(
    "targets", ["all-linear", ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"], r".*layers.*"]
)
def test_fused_layers_are_accepted(make, against, shapes, targets):
    made = make(modules=layers(FUSED, 0, 1, 2), target_modules=targets)
    assert against(made, shapes) == GOOD


@pytest.mark.parametrize("targets", ["all-linear", "list", r".*_proj"])
def test_a_base_with_layers_apart_expects_no_fused_ones(make, against, targets):
    names = [m.rpartition(".")[2] for m in APART] if targets == "list" else targets
    made = make(modules=layers(APART, 0, 1, 2), target_modules=names)
    assert against(made, APART) == GOOD


def test_one_kind_of_fused_layer(make, against):
    only = layers(FUSED, 0, 1, 2, only="qkv")
    assert against(make(modules=only, target_modules=["qkv_proj"]), APART) == GOOD
    assert against(make(modules=only, target_modules=r".*\.qkv_proj"), APART) == GOOD
    some = layers(FUSED, 1, only="qkv")
    made = make(modules=some, target_modules=["qkv_proj"], layers_to_transform=[1])
    assert against(made, APART) == GOOD
    # A list for any model names both forms.
    both = make(modules=only, target_modules=["q_proj", "k_proj", "v_proj", "qkv_proj"])
    assert against(both, APART) == GOOD


def test_fused_layers_that_are_missing(make, against):
    made = make(modules=layers(FUSED, 0, 2, only="qkv"), target_modules=["qkv_proj"])
    (warning,) = against(made, APART).warnings
    assert warning.code == "target_partly_without_tensors"
    assert warning.where == "model.layers.1.self_attn.qkv_proj"
    made = make(
        modules=layers(FUSED, 0, 1, 2, only="qkv"), target_modules=["qkv_proj", "gate_up_proj"]
    )
    assert codes(against(made, APART)) == ["target_not_in_base"]
    assert codes(against(made, FUSED)) == ["target_without_tensors"]


def test_fused_layers_outside_the_targets(make, against):
    made = make(modules=layers(FUSED, 0, 1, 2, only="qkv"), target_modules=["q_proj"])
    assert codes(against(made, APART)) == ["tensor_outside_targets"]
    made = make(
        modules=layers(FUSED, 0, 1, 2, only="qkv"),
        target_modules=["qkv_proj"],
        exclude_modules=["model.layers.1.self_attn.qkv_proj"],
    )
    found = against(made, APART)
    assert codes(found) == ["tensor_outside_targets"]
    assert found.problems[0].where == "model.layers.1.self_attn.qkv_proj"


def test_fused_layers_of_another_size(make, against):
    made = make(modules=layers({"self_attn.qkv_proj": (48, 16)}, 0), target_modules=["qkv_proj"])
    (problem,) = against(made, APART).problems
    assert problem.code == "shape_mismatch"
    assert "the base gives 32" in problem.message


def test_fused_layers_beside_their_parts(make, against):
    modules = layers(FUSED, 0, only="qkv") | layers(APART, 0, only="k_proj")
    found = against(make(modules=modules, target_modules=["qkv_proj", "k_proj"]), APART)
    assert codes(found) == ["fused_and_apart"]
    assert found.problems[0].where == "model.layers.0.self_attn.qkv_proj"
    # In different layers it is odd, and clear what is meant.
    modules = layers(FUSED, 0, only="qkv") | layers(APART, 1, only="k_proj")
    found = against(make(modules=modules, target_modules=["qkv_proj", "k_proj"]), APART)
    assert codes(found) == []


def test_parts_are_not_looked_for_in_a_fused_base(make, against):
    made = make(modules=layers(APART, 0, 1, 2, only="attn"), target_modules=["q_proj"])
    assert "module_not_in_base" in codes(against(made, FUSED))


def test_nothing_in_it(make, report):
    made = make()
    made.tensors = {}
    assert codes(report(made)) == ["no_tensors", "target_without_tensors"]


def test_other_number_types(make, report):
    assert codes(report(make(dtype="F64"))) == ["dtype_unsupported"]
    for dtype in ("F32", "F16", "BF16"):
        assert codes(report(make(dtype=dtype))) == []


def test_warnings_do_not_refuse(make, report):
    only = {"model.layers.0.self_attn.q_proj": (16, 16)}
    found = report(
        make(
            modules=only,
            target_modules=["q_proj"],
            base_model_name_or_path="/models/other-7b/",
            unsloth_version="1",
            some_flag=False,
        )
    )
    assert found.problems == ()
    assert [w.code for w in found.warnings] == [
        "base_model_differs",
        "config_key_unknown",
        "target_partly_without_tensors",
    ]
    assert "some_flag" not in found.warnings[1].message


def test_everything_at_once(make, report):
    made = make(rank=9, use_dora=True, bias="all", r="x", init_lora_weights="pissa")
    made.tensors[f"{Q0}.lora_magnitude_vector"] = ("F32", np.ones(16, "<f4"))
    made.tensors[f"{Q0}.lora_A.weight"] = ("I32", np.ones((9, 15), "<i4"))
    del made.tensors[f"{V1}.lora_A.weight"]
    assert set(codes(report(made))) == {
        "config_value",
        "dora",
        "bias",
        "init_pissa",
        "factor_missing",
        "dtype_unsupported",
        "rank_not_as_configured",
        "rank_above_max",
        "shape_mismatch",
    }


def test_problems_can_always_be_printed_and_stay_short():
    problem = Problem("c", "a\ud800\n\x1b[31m" * 1000, "m\udfff" * 9000, "f\0")
    for text in problem.as_dict().values():
        text.encode()
        assert text.isprintable()
        assert len(text) < 12_000


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scan_finds_one_bad_number(make, tmp_path, dtype, value, monkeypatch):
    monkeypatch.setattr("adapters.weights.BLOCK", 16)
    made = make(dtype=dtype)
    assert validate.scan(tmp_path, peft.read(made.write(tmp_path))) == []
    name = f"{V1}.lora_B.weight"
    numbers = np.full((8, 4), 1.0, "<f4")
    numbers[7, 3] = value
    bits = numbers.view("<u4") >> 16
    made.tensors[name] = (
        dtype,
        bits.astype("<u2")
        if dtype == "BF16"
        else numbers.astype(f"<f{2 if dtype == 'F16' else 4}"),
    )
    problems = validate.scan(tmp_path, peft.read(made.write(tmp_path)))
    assert [(p.code, p.where) for p in problems] == [("nonfinite", name)]


def test_scan_takes_the_largest_finite_numbers(make, tmp_path):
    made = make(dtype="BF16")
    made.tensors[f"{V1}.lora_B.weight"] = ("BF16", np.full((8, 4), 0x7F7F, "<u2"))
    assert validate.scan(tmp_path, peft.read(made.write(tmp_path))) == []


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.sampled_from(sorted(validate._UNDERSTOOD | validate._FEATURES.keys())),
        anything,
        max_size=6,
    )
)
def test_no_config_gets_past_the_checks_with_a_traceback(make, base, tmp_path, config):
    made = make()
    made.config |= config
    try:
        spec = peft.read(made.write(tmp_path))
    except InvalidAdapter:
        return
    json.dumps(validate.check(spec, base, 8).as_dict()).encode()
