from __future__ import annotations

import json
import math
import struct
import tempfile
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from adapters import canonical, peft, validate
from adapters.base import BaseSpec
from adapters.errors import InvalidAdapter, StoreError
from tests.adapters.conftest import Made, make

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Q = "model.layers.0.self_attn.q_proj"
SHAPES = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (4, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}
ALL = {f"model.layers.{layer}.{m}": shape for layer in (0, 1) for m, shape in SHAPES.items()}
LLAMA = BaseSpec("llama", {**ALL, "lm_head": (64, 16)}, 4096, 8192)
ONE = BaseSpec("one", {Q: (16, 16)}, 256, 512)


def name(module: str, part: str) -> str:
    return f"base_model.model.{module}.lora_{part}.weight"


def stored(made: Made, module: str, part: str) -> torch.Tensor:
    """The numbers of one factor as they are in the file, in float64."""
    dtype, numbers = made.tensors[name(module, part)]
    if dtype == "BF16":
        return torch.from_numpy(numbers.astype("<i2")).view(torch.bfloat16).double()
    return torch.from_numpy(numbers.astype("<f8"))


def write(made: Made, base: BaseSpec, dtype: str, at: Path) -> tuple[Path, list]:
    """The canonical folder of `made`, and the problems found."""
    source, into = at / "original", Path(tempfile.mkdtemp(dir=at))
    spec = peft.read(made.write(source))
    return into, canonical.write(source, spec, base, dtype, into)


def read(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(bits(found), bits(wanted))


def header(folder: Path) -> tuple[dict, int]:
    data = (folder / "adapter_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length


# Values ------------------------------------------------------------------------------------


def one(numbers: np.ndarray, dtype: str = "F32", **config) -> Made:
    """An adapter of one module whose B, 16 × 4, is `numbers`; its scaling is 1 unless given."""
    made = make(modules={Q: (16, 16)}, target_modules=["q_proj"], **{"lora_alpha": 4, **config})
    made.tensors[name(Q, "B")] = (dtype, numbers.reshape(16, 4))
    return made


any_bits = st.lists(st.integers(0, 2**32 - 1), min_size=64, max_size=64)
# Halfway between two bfloat16, or one float32 beside it.
near_ties = st.lists(
    st.builds(
        lambda upper, lower: upper << 16 | lower,
        st.integers(0, 2**16 - 1),
        st.sampled_from([0x7FFF, 0x8000, 0x8001, 0]),
    ),
    min_size=64,
    max_size=64,
)
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(any_bits | near_ties, st.sampled_from(sorted(DTYPES)))
def test_without_a_scaling_every_bit_is_torchs(tmp_path, patterns, dtype):
    numbers = np.array(patterns, "<u4").view("<f4")
    numbers[~np.isfinite(numbers)] = 1.5
    into, problems = write(one(numbers), ONE, dtype, tmp_path)
    wanted = torch.from_numpy(numbers.reshape(16, 4)).to(DTYPES[dtype])
    assert equal(read(into)[name(Q, "B")], wanted)
    assert bool(problems) == bool(wanted.isinf().any())


@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_stored_type(tmp_path, source, dtype):
    made = make(dtype=source, modules=ALL, target_modules="all-linear", lora_alpha=4)
    into, problems = write(made, LLAMA, dtype, tmp_path)
    found = read(into)
    assert problems == []
    for module in ALL:
        for part in "AB":
            wanted = stored(made, module, part).float().to(DTYPES[dtype])
            assert equal(found[name(module, part)], wanted)


def nearest(found: torch.Tensor, exact: Fraction) -> bool:
    """Whether a finite bfloat16 or float16 is the nearest to `exact`, the even one in a tie."""
    off = abs(Fraction(found.item()) - exact)
    size = int(bits(found)) & 0x7FFF  # in steps of the last place
    for beside in (size - 1, size + 1):
        other = torch.tensor(max(beside, 0), dtype=torch.int16).view(found.dtype)
        if other.isfinite():
            away = abs(Fraction(other.item()) - abs(exact))
            if away < off or (away == off > 0 and size % 2):
                return False
    return True


@quick
@given(
    st.lists(st.floats(-1000, 1000, width=32), min_size=64, max_size=64),
    st.integers(1, 100) | st.floats(2**-6, 64),
    st.booleans(),
    st.sampled_from(["BF16", "F16"]),
)
def test_a_scaled_number_is_rounded_once(tmp_path, numbers, alpha, rslora, dtype):
    array = np.array(numbers, "<f4")
    made = one(array, lora_alpha=alpha, use_rslora=rslora)
    into, _ = write(made, ONE, dtype, tmp_path)
    scaling = Fraction(alpha / (2.0 if rslora else 4))
    for found, number in zip(read(into)[name(Q, "B")].flatten(), array.tolist(), strict=True):
        if found.isfinite():
            assert nearest(found, Fraction(number) * scaling), (number, alpha)


@pytest.mark.parametrize(
    ("number", "factor", "wanted"),
    [
        # The product is closer to a tie of bfloat16 than float32 can tell.
        (1 + 2**-8, 1 + 2**-26, 1 + 2**-7),
        (1 + 2**-8, 1.0, 1.0),
        (1 + 3 * 2**-8, 1 - 2**-26, 1 + 2**-7),
        (1 + 3 * 2**-8, 1.0, 1 + 2**-6),
        (-1 - 2**-8, 1 + 2**-26, -1 - 2**-7),
        # Float64 cannot tell these from a tie.
        (125, 1.9 / 4, 59.25),
        (-125, 1.9 / 4, -59.25),
        (145, 0.9 / 4, 32.75),
        # Between zero and the smallest bfloat16.
        (2**-126, 2**-8 * (1 + 2**-26), 2**-133),
        (2**-126, 2**-8, 0.0),
    ],
)
def test_near_ties(tmp_path, number, factor, wanted):
    made = one(np.full(64, number, "<f4"), lora_alpha=4 * factor)
    into, _ = write(made, ONE, "BF16", tmp_path)
    assert set(read(into)[name(Q, "B")].flatten().tolist()) == {wanted}


@pytest.mark.parametrize("alpha", [1, 4, 8, 64])
def test_a_power_of_two_is_exact(tmp_path, alpha):
    made = make(dtype="BF16", modules=ALL, target_modules="all-linear", lora_alpha=alpha)
    into, _ = write(made, LLAMA, "BF16", tmp_path)
    found = read(into)
    for module in ALL:
        assert torch.equal(found[name(module, "A")].double(), stored(made, module, "A"))
        b = found[name(module, "B")].double()
        assert torch.equal(b, stored(made, module, "B") * alpha / 4)


def test_each_module_has_its_own_scaling(tmp_path):
    made = make(
        modules=ALL,
        target_modules="all-linear",
        use_rslora=True,
        alpha_pattern={"q_proj": 3, r"layers\.1\.mlp\.\w+": 10},
    )
    into, _ = write(made, LLAMA, "F32", tmp_path)
    found = read(into)
    for module in ALL:
        alpha = 3 if "q_proj" in module else 10 if "1.mlp" in module else 8
        wanted = (stored(made, module, "B") * (alpha / math.sqrt(4))).float()
        assert equal(found[name(module, "B")], wanted)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 7},
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"k_proj": 2}},
        {
            "target_modules": "all-linear",
            "rank_pattern": {"k_proj": 2, r"1\.mlp\.\w+": 6},
            "alpha_pattern": {".*_proj": 5},
        },
        {"target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.[kv]_proj", "exclude_modules": ["layers.0.self_attn.k_proj"]},
    ],
)
def test_the_update_is_pefts(peft_model, tiny_llama, tmp_path, config):
    model = peft_model(**{"r": 3, "lora_alpha": 8, **config})
    source, into = tmp_path / "original", tmp_path / "into"
    model.save_pretrained(source)
    into.mkdir()
    spec, base = peft.read(source), BaseSpec.read(tiny_llama, "tiny")
    assert validate.check(spec, base, 8).problems == ()
    assert canonical.write(source, spec, base, "F32", into) == []
    found = read(into)
    for module, layer in model.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight") and "default" in layer.lora_A:
            delta = found.pop(name(module, "B")) @ found.pop(name(module, "A"))
            torch.testing.assert_close(delta, layer.get_delta_weight("default"))
    assert not found


# Numbers that do not fit -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "dtype", "config", "fits"),
    [
        (65519.0, "F16", {}, True),
        (65520.0, "F16", {}, False),
        (-40000.0, "F16", {"lora_alpha": 8}, False),
        (40000.0, "F16", {"lora_alpha": 6}, True),
        (80000.0, "F16", {"lora_alpha": 2}, True),
        (3.4e38, "BF16", {}, False),
        (3.389e38, "BF16", {}, True),
        (2e38, "BF16", {"lora_alpha": 8}, False),
        (3e38, "F32", {"lora_alpha": 8}, False),
        (3.4e38, "F32", {}, True),
    ],
)
def test_overflow(tmp_path, number, dtype, config, fits):
    numbers = np.ones(64, "<f4")
    numbers[63] = number
    _, problems = write(one(numbers, **config), ONE, dtype, tmp_path)
    found = [(p.code, p.where) for p in problems]
    assert found == ([] if fits else [("overflow", name(Q, "B"))])


def test_overflow_is_one_problem_for_all_factors(tmp_path):
    made = make(modules=ALL, target_modules="all-linear")
    for part in ("A", "B"):
        dtype, numbers = made.tensors[name(Q, part)]
        made.tensors[name(Q, part)] = (dtype, numbers + 1e6)
    (problem,) = write(made, LLAMA, "F16", tmp_path)[1]
    assert "(2)" in problem.message and "float16" in problem.message
    assert problem.fix


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_what_was_not_finite_is_not_made_finite(tmp_path, dtype):
    numbers = np.zeros(64, "<f4")
    numbers.view("<u4")[:3] = 0x7F80_0001, 0x7FFF_FFFF, 0xFFFF_FFFF
    numbers[3:5] = np.inf, -np.inf
    into, problems = write(one(numbers), ONE, dtype, tmp_path)
    found = read(into)[name(Q, "B")].flatten()
    assert problems == []  # `validate.scan` has found them
    assert found[:3].isnan().all()
    assert found[3:5].tolist() == [math.inf, -math.inf]


# Fused layers ------------------------------------------------------------------------------

FUSED = {
    "model.layers.0.self_attn.qkv_proj": (28, 16),
    "model.layers.1.mlp.gate_up_proj": (48, 16),
    "model.layers.1.mlp.down_proj": (16, 24),
}


@pytest.mark.parametrize("stored_as", ["F32", "F16", "BF16"])
def test_fused_layers_are_split(tmp_path, stored_as):
    targets = ["qkv_proj", "gate_up_proj", "down_proj"]
    made = make(
        dtype=stored_as, modules=FUSED, target_modules=targets, alpha_pattern={"qkv_proj": 16}
    )
    into, problems = write(made, LLAMA, "F32", tmp_path)
    assert problems == []
    found = read(into)
    for fused, parts, scaling in (
        ("model.layers.0.self_attn.qkv_proj", {"q_proj": 16, "k_proj": 8, "v_proj": 4}, 4),
        ("model.layers.1.mlp.gate_up_proj", {"gate_proj": 24, "up_proj": 24}, 2),
    ):
        prefix = fused.rpartition(".")[0]
        rows = stored(made, fused, "B").split(list(parts.values()))
        for part, b in zip(parts, rows, strict=True):
            module = f"{prefix}.{part}"
            assert torch.equal(found.pop(name(module, "A")).double(), stored(made, fused, "A"))
            assert torch.equal(found.pop(name(module, "B")).double(), b * scaling)
    assert sorted(found) == [name("model.layers.1.mlp.down_proj", part) for part in "AB"]


def test_the_order_of_rows_is_that_of_the_fused_layer(tmp_path):
    """Whatever order the base has its own layers in."""
    base = BaseSpec("other", dict(reversed(LLAMA.linears.items())), 1, 1)
    made = make(modules=FUSED, target_modules=["qkv_proj", "gate_up_proj", "down_proj"])
    one_way, other_way = (read(write(made, each, "BF16", tmp_path)[0]) for each in (LLAMA, base))
    assert one_way.keys() == other_way.keys()
    assert all(equal(one_way[each], other_way[each]) for each in one_way)


def test_a_base_with_fused_layers_keeps_them(tmp_path):
    base = BaseSpec("phi", FUSED, 1, 1)
    made = make(modules=FUSED, target_modules=["qkv_proj", "gate_up_proj", "down_proj"])
    into, _ = write(made, base, "F32", tmp_path)
    assert read(into).keys() == made.tensors.keys()


# The files ---------------------------------------------------------------------------------


def test_the_folder_is_an_adapter_without_scaling(tmp_path):
    made = make(modules=ALL, target_modules="all-linear", use_rslora=True, alpha_pattern={"q.*": 1})
    into, _ = write(made, LLAMA, "BF16", tmp_path)
    assert sorted(p.name for p in into.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    spec = peft.read(into)
    assert validate.check(spec, LLAMA, 4) == validate.Report((), ())
    assert validate.scan(into, spec) == []
    assert spec.dtype == "BF16"
    assert {spec.scaling(module) for module in ALL} == {1.0}
    assert json.loads((into / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": sorted(m.rpartition(".")[2] for m in SHAPES),
        "bias": "none",
    }


def test_written_again_it_is_the_same(tmp_path):
    made = make(dtype="F16", modules=ALL, target_modules="all-linear")
    into, _ = write(made, LLAMA, "BF16", tmp_path)
    again, _ = write(Made(made.config, made.tensors), LLAMA, "BF16", tmp_path)
    twice, _ = write(peft_folder(into), LLAMA, "BF16", tmp_path)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (into / file).read_bytes() == (again / file).read_bytes()
        assert (into / file).read_bytes() == (twice / file).read_bytes()


def peft_folder(folder: Path) -> Made:
    """A canonical folder of BF16 as data again."""
    tensors = {
        key: ("BF16", tensor.view(torch.int16).numpy().view("<u2"))
        for key, tensor in read(folder).items()
    }
    return Made(json.loads((folder / "adapter_config.json").read_text()), tensors)


def test_the_original_order_and_metadata_do_not_show(tmp_path):
    made = make(modules=ALL, target_modules="all-linear")
    into, _ = write(made, LLAMA, "BF16", tmp_path)
    turned = Made(made.config, dict(reversed(made.tensors.items())), {"at": "noon"})
    again, _ = write(turned, LLAMA, "BF16", tmp_path)
    file = "adapter_model.safetensors"
    assert (into / file).read_bytes() == (again / file).read_bytes()


def test_header_and_order(tmp_path):
    made = make(modules=dict(reversed(ALL.items())), target_modules="all-linear")
    into, _ = write(made, LLAMA, "F16", tmp_path)
    entries, start = header(into)
    assert start % 8 == 0
    assert entries.pop("__metadata__") == {"format": "pt"}
    assert list(entries) == [name(module, part) for module in ALL for part in "AB"]
    end = 0
    for key, entry in entries.items():
        assert entry["dtype"] == "F16"
        assert entry["shape"] == list(made.tensors[key][1].shape)
        begin, end = entry["data_offsets"][0], entry["data_offsets"][1]
        assert end - begin == 2 * math.prod(entry["shape"])
    assert [e["data_offsets"][0] for e in entries.values()] == [
        0,
        *(e["data_offsets"][1] for e in list(entries.values())[:-1]),
    ]
    assert (into / "adapter_model.safetensors").stat().st_size == start + end
    with safe_open(into / "adapter_model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(entries)


def test_modules_of_different_rank(tmp_path):
    made = make(modules=ALL, target_modules="all-linear", rank_pattern={"q_proj": 7})
    for layer in (0, 1):
        module = f"model.layers.{layer}.self_attn.q_proj"
        for part, shape in (("A", (7, 16)), ("B", (16, 7))):
            made.tensors[name(module, part)] = ("F32", np.full(shape, 0.7, "<f4"))
    into, _ = write(made, LLAMA, "F32", tmp_path)
    b = read(into)[name(Q, "B")]
    assert torch.equal(b, torch.full((16, 7), float(np.float64(np.float32(0.7)) * (8 / 7))))
    spec = peft.read(into)
    assert (spec.rank, spec.alpha) == (7, 7.0)
    # vLLM takes each module's rank from its factors.
    assert [p.code for p in validate.check(spec, LLAMA, 8).problems] == ["rank_not_as_configured"]


def test_some_modules_of_some_layers(tmp_path):
    chosen = {m: s for m, s in ALL.items() if "1.self_attn.v" in m or "1.mlp.up" in m}
    made = make(modules=chosen, target_modules=["v_proj", "up_proj"], layers_to_transform=[1])
    into, _ = write(made, LLAMA, "BF16", tmp_path)
    assert json.loads((into / "adapter_config.json").read_text())["target_modules"] == [
        "up_proj",
        "v_proj",
    ]
    assert validate.check(peft.read(into), LLAMA, 8).problems == ()


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    modules = {f"layers.{i}.q_proj": (512, 512) for i in range(64)}
    made = make(rank=32, modules=modules, target_modules=["q_proj"])
    spec = peft.read(made.write(tmp_path / "original"))
    into = tmp_path / "into"
    into.mkdir()
    del made
    base = BaseSpec("big", modules, 1, 1)
    tracemalloc.start()
    assert canonical.write(tmp_path / "original", spec, base, "BF16", into) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tensor = 4 * 32 * 512
    assert peak < 12 * tensor < spec.bytes / 8


# What cannot be done -----------------------------------------------------------------------


def test_a_file_that_has_become_shorter(tmp_path):
    spec = peft.read(make(modules=ALL, target_modules="all-linear").write(tmp_path / "a"))
    with (tmp_path / "a" / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(spec.bytes - 10)
    (tmp_path / "into").mkdir()
    with pytest.raises(InvalidAdapter):
        canonical.write(tmp_path / "a", spec, LLAMA, "BF16", tmp_path / "into")


def test_nowhere_to_write(tmp_path):
    spec = peft.read(make(modules=ALL, target_modules="all-linear").write(tmp_path / "a"))
    with pytest.raises(StoreError):
        canonical.write(tmp_path / "a", spec, LLAMA, "BF16", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="F64"):
        canonical.write(tmp_path / "a", spec, LLAMA, "F64", tmp_path)


def test_key():
    found = canonical.key(LLAMA, "BF16")
    assert found.startswith("engine-v1-bf16-")
    assert len(found) == len("engine-v1-bf16-") + 12
    same = BaseSpec("renamed", dict(LLAMA.linears), 1, 1)
    assert canonical.key(same, "BF16") == found
    wider = BaseSpec("llama", {**LLAMA.linears, Q: (32, 16)}, 4096, 8192)
    turned = BaseSpec("llama", dict(reversed(LLAMA.linears.items())), 4096, 8192)
    keys = {canonical.key(LLAMA, dtype) for dtype in DTYPES}
    assert len(keys | {canonical.key(ONE, "BF16")} | {canonical.key(wider, "BF16")}) == 5
    assert canonical.key(turned, "BF16") != found
