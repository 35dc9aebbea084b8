"""Whether an adapter can be served exactly on a base: every reason why not, at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapters.base import BaseSpec
from adapters.errors import Problem
from adapters.folder import WEIGHTS, open_regular
from adapters.peft import AdapterSpec
from adapters.targets import BadPattern, suffixes
from adapters.weights import blocks


@dataclass(frozen=True, slots=True)
class Report:
    """`problems` keep an adapter from being served; `warnings` do not."""

    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()

    def as_dict(self) -> dict[str, list[dict[str, str]]]:
        """For JSON."""
        return {
            "problems": [p.as_dict() for p in self.problems],
            "warnings": [w.as_dict() for w in self.warnings],
        }


def check(spec: AdapterSpec, base: BaseSpec, max_rank: int) -> Report:
    """Checks everything that config and header say; `scan` checks the numbers themselves."""
    if spec.peft_type != "LORA":
        message = f"The adapter's peft_type is {spec.peft_type or 'missing'}, not LORA."
        fix = "Train a LoRA adapter; no other PEFT method can be served."
        return Report((Problem("peft_type", "peft_type", message, fix),))
    modules = _trained(spec, base)
    targeted, faults = _targeted(spec, modules)
    problems = [
        *spec.faults,
        *faults,
        *_features(spec),
        *_unknown_tensors(spec),
        *_factors(spec),
        *_ranks(spec, max_rank),
        *_modules(spec, base),
        *_targets(spec, base, modules, targeted),
    ]
    return Report(_once(problems), tuple(_warnings(spec, base, targeted)))


def _once(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """A feature shows in the config and again in the tensors it adds; the first is enough."""
    found: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        key = problem.where if problem.code.startswith("config_") else ""
        found.setdefault((problem.code, key), problem)
    return tuple(found.values())


# Features ----------------------------------------------------------------------------------

_PLAIN = "Train it as plain LoRA, or merge the feature away with PEFT before saving."
_MERGE = "Merge the adapter into the base with merge_and_unload and serve the result as a base."

# Config key → (problem code, name, what to do).
_FEATURES: dict[str, tuple[str, str, str]] = {
    "use_dora": ("dora", "DoRA", "Train it with use_dora=False."),
    "lora_bias": ("lora_bias", "A bias on LoRA's B (lora_bias)", "Train it with lora_bias=False."),
    "modules_to_save": (
        "modules_to_save",
        "Whole modules beside the LoRA factors (modules_to_save)",
        "Train it without modules_to_save.",
    ),
    "alora_invocation_tokens": ("alora", "Activated LoRA (aLoRA)", _PLAIN),
    "layer_replication": ("layer_replication", "layer_replication", _MERGE),
    "use_bdlora": ("bdlora", "Block-diagonal LoRA (BD-LoRA)", _PLAIN),
    "use_qalora": ("qalora", "QALoRA", "Train it with use_qalora=False."),
    "megatron_config": ("megatron", "Megatron layers", _PLAIN),
    "trainable_token_indices": (
        "trainable_tokens",
        "Trained token embeddings (trainable_token_indices)",
        "Train it on the base's own tokens.",
    ),
    "target_parameters": (
        "target_parameters",
        "LoRA on bare parameters (target_parameters)",
        "Target linear layers with target_modules.",
    ),
    "arrow_config": ("arrow", "Arrow routing", _PLAIN),
    "kasa_config": ("kasa", "KaSA", _MERGE),
    "velora_config": ("velora", "VeLoRA", _PLAIN),
    "monteclora_config": ("monteclora", "MonteCLoRA", _PLAIN),
}

# These only choose where training starts; the others change the base's weights as PEFT loads.
_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})

# fmt: off
_UNDERSTOOD = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora",
))
# fmt: on


def _features(spec: AdapterSpec) -> Iterator[Problem]:
    for key, (code, name, fix) in _FEATURES.items():
        # An empty object switches a feature on with its defaults.
        if spec.config.get(key) not in (None, False, "", []):
            yield Problem(code, key, f"{name} cannot be served.", fix)
    bias = spec.config.get("bias", "none")
    if bias not in ("none", None):
        message = f"The adapter changes the base's biases (bias={bias!r:.40})."
        yield Problem("bias", "bias", message, 'Train it with bias="none".')
    init = spec.config.get("init_lora_weights", True)
    if not isinstance(init, bool | None) and str(init).lower() not in _HARMLESS_INITS:
        yield Problem(
            f"init_{_init_code(str(init))}",
            "init_lora_weights",
            f"init_lora_weights={init!r:.40} changes the base's weights when PEFT loads the "
            "adapter.",
            "Save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA.",
        )


def _init_code(init: str) -> str:
    known = ("pissa", "olora", "corda", "loftq")
    return next((k for k in known if init.lower().startswith(k)), "unsupported")


# Tensors -----------------------------------------------------------------------------------

_RESAVE = "Save it with PEFT's save_pretrained."
_EMBEDDINGS = ("embed_tokens", "lm_head")
_EMBEDDING_FIX = "Train it without embed_tokens and lm_head in target_modules."
_WHOLE_FIX = "Train it on the base's own tokens, and save with save_embedding_layers=False."

# The first pattern that a tensor's name matches says what it is: code, what to say, what to do.
_KINDS: tuple[tuple[str, str, str, str], ...] = (
    (
        r".*\.lora_[AB]\.(?!weight$|bias$)[^.]+(\.weight)?",
        "adapter_name_in_key",
        "Tensor names with PEFT's internal adapter name in them",
        f"They come from state_dict(). {_RESAVE}",
    ),
    (
        r".*\.lora_embedding_[AB](\..*)?",
        "embedding_lora",
        "LoRA on embeddings cannot be served yet",
        _EMBEDDING_FIX,
    ),
    (r".*\.lora_magnitude_vector(\..*)?", "dora", "DoRA's magnitudes", _FEATURES["use_dora"][2]),
    (r".*\.lora_[AB]\.bias", "lora_bias", "Biases of LoRA's factors", _FEATURES["lora_bias"][2]),
    (r".*\.lora_diag(\..*)?", "kasa", "KaSA's singular values", _MERGE),
    (
        r".*\.(token_adapter|trainable_tokens_\w+)(\..*)?",
        "trainable_tokens",
        "Trained token embeddings",
        _FEATURES["trainable_token_indices"][2],
    ),
    (
        r"(.*\.)?(embed_tokens|lm_head)(\.base_layer)?\.(weight|bias)",
        "embedding_weights",
        "Whole embedding weights (a changed vocabulary?) cannot be served",
        _WHOLE_FIX,
    ),
    (
        r"(?!base_model\.model\.).*\.lora_[AB]\.weight",
        "tensor_prefix",
        "Tensor names that do not begin with base_model.model.",
        _RESAVE,
    ),
    (r"[\s\S]*", "unknown_tensor", "Tensors that are no LoRA factor", _RESAVE),
)


def _unknown_tensors(spec: AdapterSpec) -> Iterator[Problem]:
    found: dict[str, list[str]] = {}
    for name in spec.unknown:
        kind = next(k for k in _KINDS if re.fullmatch(k[0], name))
        found.setdefault(kind[1], []).append(name)
    for _, code, message, fix in _KINDS:
        yield from Problem.grouped(code, found.get(code, []), message, fix)


def _factors(spec: AdapterSpec) -> Iterator[Problem]:
    if not spec.modules and not spec.unknown:
        yield Problem("no_tensors", WEIGHTS, "The file has no tensors.", _RESAVE)
    pairs = spec.modules.items()
    yield from Problem.grouped(
        "factor_missing",
        (f"{m}.lora_{'A' if p.a is None else 'B'}" for m, p in pairs if len(p.tensors) < 2),
        "Factors that are missing while their partner is there",
        _RESAVE,
    )
    tensors = [t for pair in spec.modules.values() for t in pair.tensors]
    yield from Problem.grouped(
        "dtype_unsupported",
        (t.name for t in tensors if t.dtype not in _EXPONENTS),
        f"Factors of another type than {', '.join(_EXPONENTS)}",
        "Save the adapter in bfloat16, float16 or float32.",
    )
    yield from Problem.grouped(
        "not_a_matrix",
        (t.name for t in tensors if len(t.shape) != 2 or 0 in t.shape),
        "Factors that are no matrix or have no numbers",
        "If training used ZeRO-3 or FSDP, gather the parameters before saving.",
    )


def _ranks(spec: AdapterSpec, max_rank: int) -> Iterator[Problem]:
    uneven, unlike, large = [], [], []
    for module in spec.modules:
        ranks = _pair_ranks(spec, module)
        if len(set(ranks)) > 1:
            uneven.append(f"{module} (A {ranks[0]}, B {ranks[1]})")
        elif ranks and ranks[0] != spec.expected_rank(module):
            unlike.append(f"{module} ({ranks[0]}, config {spec.expected_rank(module)})")
        if ranks and max(ranks) > max_rank:
            large.append(f"{module} ({max(ranks)})")
    configured = {"r": spec.rank, **spec.rank_pattern}
    large += [f"config {key} ({rank})" for key, rank in configured.items() if rank > max_rank]
    retrain = "Correct r and rank_pattern in the config, or save the adapter again."
    yield from Problem.grouped(
        "rank_inconsistent", uneven, "Modules whose A and B differ in rank", _RESAVE
    )
    yield from Problem.grouped(
        "rank_not_as_configured", unlike, "Modules whose rank is not the one in the config", retrain
    )
    yield from Problem.grouped(
        "rank_above_max",
        large,
        f"Ranks above {max_rank}, the largest this server takes",
        f"Train with r of at most {max_rank}, or start the server with a larger maximum rank.",
    )


def _pair_ranks(spec: AdapterSpec, module: str) -> list[int]:
    """The ranks of A and B, as far as the two are there and matrices."""
    pair = spec.modules[module]
    a = [pair.a.shape[0]] if pair.a is not None and len(pair.a.shape) == 2 else []
    b = [pair.b.shape[1]] if pair.b is not None and len(pair.b.shape) == 2 else []
    return a + b


# Modules -----------------------------------------------------------------------------------


def _is_embedding(module: str) -> bool:
    return module.rsplit(".", 1)[-1] in _EMBEDDINGS


def _modules(spec: AdapterSpec, base: BaseSpec) -> Iterator[Problem]:
    yield from Problem.grouped(
        "embedding_lora",
        filter(_is_embedding, spec.modules),
        "LoRA on embedding or output layers cannot be served yet",
        _EMBEDDING_FIX,
    )
    linear = [m for m in spec.modules if not _is_embedding(m)]
    strangers = [m for m in linear if m not in base.shapes]
    amount = "None of the adapter's modules is" if strangers == linear else "Modules that are not"
    yield from Problem.grouped(
        "module_not_in_base",
        strangers,
        f"{amount} in {base.name}",
        f"Upload an adapter trained on {base.name}.",
    )
    yield from Problem.grouped(
        "shape_mismatch",
        (line for m in linear if m in base.shapes for line in _misfits(spec, base, m)),
        f"Factors that do not fit {base.name}",
        f"Upload an adapter trained on {base.name}; this one was trained on another size.",
    )
    yield from Problem.grouped(
        "fused_and_apart",
        (m for m in linear if not spec.modules.keys().isdisjoint(base.fused.get(m, ()))),
        "Fused layers beside factors of one of their own parts",
        "Save the adapter with either the fused layers or their parts.",
    )


def _misfits(spec: AdapterSpec, base: BaseSpec, module: str) -> Iterator[str]:
    d_out, d_in = base.shapes[module]
    a, b = spec.modules[module].a, spec.modules[module].b
    if a is not None and len(a.shape) == 2 and a.shape[1] != d_in:
        yield f"{module}.lora_A is {list(a.shape)}, the base takes {d_in}"
    if b is not None and len(b.shape) == 2 and b.shape[0] != d_out:
        yield f"{module}.lora_B is {list(b.shape)}, the base gives {d_out}"


def _trained(spec: AdapterSpec, base: BaseSpec) -> set[str]:
    """The base's modules as the model had them that the adapter was trained on.

    A kind of layer is fused there if the adapter has a fused layer of that kind.
    """
    kinds = {m.rpartition(".")[2] for m in spec.modules if m in base.fused}
    fused = {m: parts for m, parts in base.fused.items() if m.rpartition(".")[2] in kinds}
    apart = {part for parts in fused.values() for part in parts} - spec.modules.keys()
    return (base.linears.keys() - apart) | fused.keys()


def _targeted(spec: AdapterSpec, modules: Iterable[str]) -> tuple[set[str], list[Problem]]:
    """Those of `modules` that the config targets."""
    try:
        return spec.targets.among(modules), []
    except BadPattern as error:
        fix = "List plain module names."
        return set(), [Problem("config_pattern", "target_modules", str(error), fix)]


def _targets(
    spec: AdapterSpec, base: BaseSpec, modules: set[str], targeted: set[str]
) -> Iterator[Problem]:
    """Where config and file disagree on what is adapted, PEFT and the engine do too."""
    known = [m for m in spec.modules if m in base.shapes and not _is_embedding(m)]
    yield from Problem.grouped(
        "tensor_outside_targets",
        (m for m in known if m not in targeted),
        "Modules that have factors but are not targeted by the config",
        "Correct target_modules in the config, or save the adapter again.",
    )
    unmatched, empty = _idle_targets(spec, base.linears.keys() | modules, targeted)
    yield from Problem.grouped(
        "target_not_in_base",
        unmatched,
        f"Entries of target_modules that match nothing in {base.name}",
        "Take them out of target_modules, or upload an adapter for this base.",
    )
    yield from Problem.grouped(
        "target_without_tensors",
        empty,
        "Entries of target_modules without tensors in the file",
        "Take them out of target_modules, or save the adapter again.",
    )


def _idle_targets(
    spec: AdapterSpec, modules: set[str], targeted: set[str]
) -> tuple[list[str], list[str]]:
    """Targets that match no module, and those that match some of which the file has none."""
    names = spec.targets.modules
    present = targeted & set(spec.modules)
    if isinstance(names, str):
        return ([], [] if present else [names]) if targeted else ([names], [])
    anywhere, wanted, filled = map(_all_suffixes, (modules, targeted, present))
    unmatched = [n for n in names if n not in anywhere and not _is_embedding(n)]
    return unmatched, [n for n in names if n in wanted and n not in filled]


def _all_suffixes(modules: Iterable[str]) -> set[str]:
    return {suffix for module in modules for suffix in suffixes(module)}


def _warnings(spec: AdapterSpec, base: BaseSpec, targeted: set[str]) -> Iterator[Problem]:
    recorded = (spec.base_model or "").rstrip("/").rsplit("/", 1)[-1]
    if recorded and recorded.lower() != base.name.rsplit("/", 1)[-1].lower():
        message = f"The adapter says it was trained on {spec.base_model}; this is {base.name}."
        fix = "Nothing, if they are the same weights."
        yield Problem("base_model_differs", "base_model_name_or_path", message, fix)
    understood = _UNDERSTOOD | _FEATURES.keys()
    yield from Problem.grouped(
        "config_key_unknown",
        (key for key, value in spec.config.items() if value and key not in understood),
        "Config keys that mean nothing here and are ignored",
        "Nothing, if they do not change what the adapter computes.",
    )
    yield from Problem.grouped(
        "target_partly_without_tensors",
        (m for m in targeted if m not in spec.modules and not _is_embedding(m)),
        "Targeted modules without factors, which stay as in the base",
        "Nothing, if it was trained so; otherwise save the adapter again.",
    )


# Numbers -----------------------------------------------------------------------------------

# A number is NaN or infinite exactly when all of its exponent's bits are set.
_EXPONENTS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "F32": (lambda b: np.frombuffer(b, "<u4"), np.uint32(0x7F80_0000)),
    "F16": (lambda b: np.frombuffer(b, "<u2"), np.uint16(0x7C00)),
    "BF16": (lambda b: np.frombuffer(b, "<u2"), np.uint16(0x7F80)),
}


def scan(folder: Path, spec: AdapterSpec) -> list[Problem]:
    """Looks for NaN and infinity in every factor, in constant memory.

    Raises InvalidAdapter if the file is shorter than its header, StoreError if the disk fails.
    """
    bad = []
    with open_regular(folder, WEIGHTS) as file:
        for pair in spec.modules.values():
            for tensor in pair.tensors:
                if tensor.dtype in _EXPONENTS:
                    numbers, mask = _EXPONENTS[tensor.dtype]
                    if any(np.any(numbers(b) & mask == mask) for b in blocks(file, tensor)):
                        bad.append(tensor.name)
    return Problem.grouped(
        "nonfinite",
        bad,
        "Factors with NaN or infinite numbers",
        "Training diverged; train again with a lower learning rate.",
    )
