"""Every kind of PEFT adapter, in the form the engine loads, is what PEFT makes of the original.

All kinds are in one batch with rows of the base. That a test can fail is tested as well: a reply is
out of tolerance against the base, and against the same adapter with its scaling left out or its
patterns and rsLoRA ignored.
"""

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Phi3Config,
    Phi3ForCausalLM,
)

from adapters import canonical, peft, validate
from adapters.base import FUSED, BaseSpec
from tests.real.one_batch import MAX_RANK
from tests.real.reference import Reference, Reply, gap

# The second is longer than a step of the engine takes.
PROMPTS = (
    "The three largest oceans of the earth are the",
    "A river begins as a spring in the hills. It gathers water from the rain and from smaller "
    "streams, grows wider in the valley, passes the fields, the mills and the towns on its way, "
    "turns slow and brown in the plain, and at the end of its way it reaches the",
)
SPREAD_B = 0.02  # its standard deviation, here and below large enough to be out of tolerance


@dataclass(frozen=True)
class Variant:
    """LoraConfig's arguments, the type it is stored in (torch's name), and its base's layout."""

    config: Mapping[str, Any]
    dtype: str = "float32"
    fused: bool = False
    spread: float = SPREAD_B
    ignored: Mapping[str, Any] = field(default_factory=dict)  # config of one who reads less of it


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN = {"r": 8, "lora_alpha": 32, "target_modules": SEVEN}
RANKS = {"k_proj": 4, r"mlp\.(gate|down)_proj": 32}
ALPHAS = {"down_proj": 4, r"layers\.1\d\.self_attn\.(q|v)_proj": 64}
QKV = {**PLAIN, "target_modules": ["qkv_proj"]}
GATE_UP = {**PLAIN, "target_modules": ["gate_up_proj", "down_proj"]}

VARIANTS = {
    "plain": Variant(PLAIN),
    "in float16": Variant(PLAIN, "float16"),
    "in bfloat16": Variant(PLAIN, "bfloat16"),
    "rank_pattern": Variant(
        {**PLAIN, "rank_pattern": RANKS},
        # α over the config's r for every module, whatever its own rank.
        ignored={"alpha_pattern": {key: 32 * rank / 8 for key, rank in RANKS.items()}},
    ),
    "alpha_pattern": Variant(
        {**PLAIN, "alpha_pattern": ALPHAS}, spread=0.03, ignored={"alpha_pattern": {}}
    ),
    "both patterns": Variant(
        {**PLAIN, "rank_pattern": RANKS, "alpha_pattern": ALPHAS},
        spread=0.03,
        ignored={"alpha_pattern": {}},
    ),
    "rslora": Variant(
        {**PLAIN, "lora_alpha": 12, "use_rslora": True}, ignored={"use_rslora": False}
    ),
    "odd scaling": Variant({**PLAIN, "r": 12, "lora_alpha": 50}),
    "layers": Variant(
        {**PLAIN, "layers_to_transform": list(range(0, 30, 2)), "layers_pattern": "layers"},
        spread=0.03,
    ),
    "exclude": Variant(
        {**PLAIN, "target_modules": "all-linear", "exclude_modules": ["k_proj", "up_proj"]}
    ),
    "regex": Variant(
        {**PLAIN, "target_modules": r"model\.layers\.\d*[02468]\.(self_attn\.[qv]|mlp\.down)_proj"},
        spread=0.03,
    ),
    "subset": Variant({**PLAIN, "target_modules": ["v_proj", "down_proj"]}, spread=0.03),
    "qkv_proj": Variant(QKV, fused=True, spread=0.03),
    "gate_up_proj": Variant(GATE_UP, fused=True, spread=0.03),
    "all fused": Variant(
        {**PLAIN, "lora_alpha": 12, "target_modules": "all-linear", "use_rslora": True}, fused=True
    ),
}
FUSED_ONES = [name for name, variant in VARIANTS.items() if variant.fused]


@dataclass(frozen=True)
class Row:
    """One request and the engine's answer: a variant's name (or `base`), a prompt, a reply."""

    name: str
    prompt: list[int]
    reply: Reply


def save(folder: Path, base: Path, seed: int, variant: Variant) -> None:
    """A variant with random factors, as PEFT's save_pretrained writes it."""
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    config = LoraConfig(task_type="CAUSAL_LM", **variant.config)
    model = get_peft_model(bare, config, low_cpu_mem_usage=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            spread = variant.spread if "lora_B" in name else parameter.shape[-1] ** -0.5
            values = spread * torch.randn(parameter.shape, generator=generator)
            weights[name] = values.to(getattr(torch, variant.dtype))
    model.load_state_dict(weights, strict=False, assign=True)
    model.save_pretrained(folder)


def bent(folder: Path, into: Path, changes: Mapping[str, Any]) -> Path:
    """The same weights under another config."""
    into.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    (into / "adapter_config.json").write_text(json.dumps(config | changes))
    (into / "adapter_model.safetensors").symlink_to(folder / "adapter_model.safetensors")
    return into


def unscaled(folder: Path) -> dict[str, Any]:
    """What makes the scaling of every module 1."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return {"lora_alpha": config["r"], "alpha_pattern": config["rank_pattern"], "use_rslora": False}


def save_fused(llama: Path, into: Path) -> None:
    """The same model with the layout of Phi-3, in the llama's own dtype."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    known = {k: v for k, v in model.config.to_dict().items() if k in Phi3Config().to_dict()}
    left_out = ("model_type", "architectures", "rope_parameters")
    config = Phi3Config(
        **{k: v for k, v in known.items() if k not in left_out},
        rope_parameters=dict(model.config.rope_parameters),
    )
    config.original_max_position_embeddings = config.max_position_embeddings
    weights = model.state_dict()
    for layer in range(config.num_hidden_layers):
        for name, parts in FUSED.items():
            inside = "self_attn" if name == "qkv_proj" else "mlp"
            prefix = f"model.layers.{layer}.{inside}"
            rows = [weights.pop(f"{prefix}.{part}.weight") for part in parts]
            weights[f"{prefix}.{name}.weight"] = torch.cat(rows)
    fused = Phi3ForCausalLM(config).to(model.dtype)
    fused.load_state_dict(weights)
    fused.save_pretrained(into)


def run(base: Path, tokenizer: Path, folders: Mapping[str, Path], at: Path) -> list[Row]:
    """One batch on a real engine: every adapter in `folders` and the base, two prompts each."""
    spec = BaseSpec.read(base, "base")
    tokens = AutoTokenizer.from_pretrained(tokenizer)(list(PROMPTS))["input_ids"]
    rows = list(itertools.product(["base", *folders], tokens))
    random.Random(1).shuffle(rows)
    asked = [{"adapter": loaded(name, folders, spec, at), "prompt": p} for name, p in rows]
    linears = sorted({path.rpartition(".")[2] for path in spec.linears} - {"lm_head"})
    plan = at / "plan.json"
    plan.write_text(json.dumps({"base": str(base), "linears": linears, "rows": asked}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.real.one_batch", str(plan)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    *_, form, answers = done.stdout.splitlines()
    assert form.startswith(("op: avx", "op: generic")), form
    return [
        Row(name, prompt, Reply.read(told))
        for (name, prompt), told in zip(rows, json.loads(answers), strict=True)
    ]


def loaded(name: str, folders: Mapping[str, Path], base: BaseSpec, at: Path) -> str | None:
    """The folder the engine is given for an adapter: its canonical form."""
    if name == "base":
        return None
    into = at / name
    if not into.exists():
        into.mkdir()
        spec = peft.read(folders[name])
        assert validate.check(spec, base, MAX_RANK).problems == ()
        assert canonical.write(folders[name], spec, base, "BF16", into) == []
    return str(into)


@pytest.fixture(scope="module")
def fused_base(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phi3")
    save_fused(base_folder, folder)
    return folder


@pytest.fixture(scope="module")
def originals(
    base_folder: Path, fused_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The adapters as PEFT saved them."""
    folders = {name: tmp_path_factory.mktemp("original") for name in VARIANTS}
    for seed, (name, variant) in enumerate(VARIANTS.items()):
        save(folders[name], fused_base if variant.fused else base_folder, seed, variant)
    return folders


@pytest.fixture(scope="module")
def bases(base_folder: Path, fused_base: Path) -> dict[bool, Path]:
    """By whether its layers are fused."""
    return {False: base_folder, True: fused_base}


@pytest.fixture
def reference(
    request: pytest.FixtureRequest,
    bases: dict[bool, Path],
    originals: dict[str, Path],
    tmp_path: Path,
) -> Reference:
    """The test's variant, and its bent forms."""
    name = request.getfixturevalue("name")
    variant, folder = VARIANTS[name], originals[name]
    known = {name: folder, "unscaled": bent(folder, tmp_path / "unscaled", unscaled(folder))}
    if variant.ignored:
        known["ignored"] = bent(folder, tmp_path / "ignored", variant.ignored)
    return Reference(bases[variant.fused], known)


@pytest.fixture(scope="module")
def rows(
    base_folder: Path, originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Row]:
    return run(base_folder, base_folder, originals, tmp_path_factory.mktemp("canonical"))


@pytest.fixture(scope="module")
def fused_rows(
    base_folder: Path,
    fused_base: Path,
    originals: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Row]:
    folders = {name: originals[name] for name in FUSED_ONES}
    return run(fused_base, base_folder, folders, tmp_path_factory.mktemp("canonical"))


def held(row: Row, reference: Reference, name: str) -> float:
    """The share of the tolerance that a row uses, against one of the reference's adapters."""
    return gap(row.reply, reference.logprobs(name, row.prompt, row.reply.tokens))


def holds(rows: list[Row], name: str, reference: Reference) -> None:
    """A variant's rows are in tolerance against itself, one is out of it against what it is not."""
    own = sorted((row for row in rows if row.name == name), key=lambda row: len(row.prompt))
    assert len(own) == len(PROMPTS)
    others = ["base", "unscaled", *(["ignored"] if VARIANTS[name].ignored else [])]
    used = [held(row, reference, name) for row in own]
    off = {other: held(own[0], reference, other) for other in others}
    print(name, *(f"{each:.2f}" for each in used), {k: round(v, 2) for k, v in off.items()})
    assert max(used) < 1
    assert min(off.values()) > 1


@pytest.mark.parametrize("name", VARIANTS)
def test_the_engine_says_what_peft_says(rows: list[Row], reference: Reference, name: str) -> None:
    holds(rows, name, reference)


@pytest.mark.parametrize("name", FUSED_ONES)
def test_a_base_with_fused_layers_says_the_same(
    fused_rows: list[Row], reference: Reference, name: str
) -> None:
    holds(fused_rows, name, reference)


def test_the_fused_base_is_the_same_model_and_no_adapter_touches_it(
    rows: list[Row], fused_rows: list[Row], bases: dict[bool, Path], originals: dict[str, Path]
) -> None:
    apart = Reference(bases[False], {"plain": originals["plain"]})
    fused = Reference(bases[True], {"qkv_proj": originals["qkv_proj"]})
    for row in rows + fused_rows:
        if row.name == "base":
            wanted = apart.logprobs("base", row.prompt, row.reply.tokens)
            same = fused.logprobs("base", row.prompt, row.reply.tokens)
            torch.testing.assert_close(same, wanted, rtol=0, atol=1e-4)
            assert gap(row.reply, wanted) < 1
