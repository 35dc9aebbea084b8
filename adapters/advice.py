"""Whether an adapter is well made: advice, never a reason to refuse it.

The rules of thumb are those of the project's LoRA guide: start with r = 8, set α = 2·r, adapt
every linear layer (Dettmers et al., QLoRA, 2023), and keep the file small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from adapters.algebra import Algebra
from adapters.errors import Problem, listing
from adapters.folder import WEIGHTS
from adapters.peft import AdapterSpec

_SCALING = 2.0  # α/r
_FIRST_RANK = 8
# What the first LoRA papers adapted, and the layers that have it in one piece in some models.
_FEW = frozenset({"q_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"})


def advise(spec: AdapterSpec, algebra: Algebra) -> tuple[Problem, ...]:
    """What could be better about an adapter that can be served; nothing for most.

    The codes are `alpha_not_twice_rank`, `rank_more_than_needed`, `few_targets` and
    `stored_in_fp32`.
    """
    return (
        *_alpha(spec, algebra),
        *_rank(algebra),
        *_targets(algebra),
        *_type(spec),
    )


def _alpha(spec: AdapterSpec, algebra: Algebra) -> Iterator[Problem]:
    if spec.rslora:  # It scales by α/√r, of which the rule does not speak.
        return
    odd = Counter(
        f"{layer.scaling:g} at rank {layer.rank}"
        for layer in algebra.layers
        if layer.scaling != _SCALING
    )
    if odd:
        total = len(algebra.layers)
        found = listing(f"{scale} ({count} of {total} layers)" for scale, count in odd.items())
        message = (
            f"B·A is scaled by lora_alpha / r = {found}; the rule of thumb is lora_alpha = 2·r, "
            f"a scale of {_SCALING:g}."
        )
        fix = (
            "Nothing, if it was chosen; otherwise train with lora_alpha = 2·r. Changing it in the "
            "config alone would scale what was trained."
        )
        yield Problem("alpha_not_twice_rank", "lora_alpha", message, fix)


def _rank(algebra: Algebra) -> Iterator[Problem]:
    """Speaks up where at least half of the numbers could go.

    Not at ranks the guide would begin with: there is little to save.
    """
    rank = max((layer.rank for layer in algebra.layers), default=0)
    enough = algebra.rank_99
    kept = sum(min(layer.rank, enough) * (layer.d_in + layer.d_out) for layer in algebra.layers)
    if rank <= _FIRST_RANK or not enough or 2 * kept > algebra.parameters:
        return
    saved = round(algebra.bytes * (1 - kept / algebra.parameters))
    message = (
        f"99 % of the energy ‖ΔW‖² is in the {enough} largest directions of each layer, and r is "
        f"{rank}. At rank {enough} the adapter would take {_size(saved)} less."
    )
    fix = f"Train with r={enough} and compare the two."
    yield Problem("rank_more_than_needed", "r", message, fix)


def _targets(algebra: Algebra) -> Iterator[Problem]:
    kinds = {layer.module.rsplit(".", 1)[-1] for layer in algebra.layers}
    if kinds and kinds <= _FEW:
        message = (
            f"Adapted: {listing(kinds, len(_FEW))} only, as in the first LoRA papers; "
            "attention's output and the feed-forward layers stay as in the base. Adapting every "
            "linear layer does better, as the QLoRA paper showed, and costs little."
        )
        fix = 'Train with target_modules="all-linear".'
        yield Problem("few_targets", "target_modules", message, fix)


def _type(spec: AdapterSpec) -> Iterator[Problem]:
    tensors = [t for pair in spec.modules.values() for t in pair.tensors if t.dtype == "F32"]
    if tensors:
        saved = sum(t.elements for t in tensors) * 2
        message = (
            "The numbers are stored as float32. In bfloat16, to which a bfloat16 base rounds them "
            f"anyway, they would take {_size(saved)} less."
        )
        fix = "Save it after model.to(torch.bfloat16)."
        yield Problem("stored_in_fp32", WEIGHTS, message, fix)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
