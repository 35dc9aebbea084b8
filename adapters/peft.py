"""A PEFT folder, read into an AdapterSpec without touching tensor data."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from adapters import jsontext, weights
from adapters.errors import InvalidAdapter, Problem, clean
from adapters.folder import CONFIG, WEIGHTS, absent, disk, open_regular
from adapters.targets import BadPattern, Patterns, Targets, per_module
from adapters.weights import Tensor, Weights

MAX_CONFIG = 2**20
# An adapter of the largest models has a few thousand entries in any of these.
_MAX_ENTRIES = 10_000

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of one module: A is [rank, d_in], B is [d_out, rank]; a broken file may
    lack one."""

    a: Tensor | None
    b: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The factors there are, A first."""
        return tuple(t for t in (self.a, self.b) if t is not None)


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What a PEFT folder says about itself.

    `modules` maps module paths as in the base (`model.layers.0.self_attn.q_proj`) to factors;
    `unknown` are tensors that are no LoRA factor of a linear layer. `rank` and `alpha` are the
    config's; `ranks` and `alphas` are what its patterns say of single modules. A config value of
    the wrong type is in `faults` and PEFT's default stands in its place. `bytes` is the size of
    the weights file, `parameters` the number of numbers in A and B together.
    """

    config: Mapping[str, Any]
    weights: Weights
    modules: Mapping[str, Pair]
    unknown: tuple[str, ...]
    peft_type: str
    base_model: str | None
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: Targets
    faults: tuple[Problem, ...] = field(default=())

    @property
    def bytes(self) -> int:
        """Size of the weights file."""
        return self.weights.bytes

    @property
    def parameters(self) -> int:
        """Numbers in all A and B."""
        return sum(t.elements for pair in self.modules.values() for t in pair.tensors)

    @property
    def dtype(self) -> str:
        """The factors' type in safetensors' words; several are joined by `+`."""
        return "+".join(sorted({t.dtype for p in self.modules.values() for t in p.tensors}))

    @property
    def target_modules(self) -> tuple[str, ...] | str:
        """The names the config lists, sorted, or its pattern."""
        modules = self.targets.modules
        return modules if isinstance(modules, str) else tuple(sorted(modules))

    def expected_rank(self, module: str) -> int:
        """The rank the config gives `module`."""
        return self.ranks.get(module, self.rank)

    def scaling(self, module: str) -> float:
        """The factor PEFT multiplies B·A of `module` by: alpha/r, or alpha/√r with rsLoRA."""
        rank, alpha = self.expected_rank(module), self.alphas.get(module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read(folder: Path) -> AdapterSpec:
    """Reads `folder`'s config and its weights' header.

    Raises InvalidAdapter, with the problems of both files, if either cannot be read at all, and
    StoreError if the disk fails. What can be read past is left to `validate.check`.
    """
    with disk("read the adapter's folder"):
        names = os.listdir(folder)
    problems = absent(names)
    config: dict[str, Any] = {}
    header = Weights({}, 0)
    try:
        if CONFIG in names:
            config = _read_config(folder)
    except InvalidAdapter as error:
        problems += error.problems
    try:
        if WEIGHTS in names:
            header = weights.read(folder)
    except InvalidAdapter as error:
        problems += error.problems
    if problems:
        raise InvalidAdapter(problems)
    return _spec(config, header)


def _read_config(folder: Path) -> dict[str, Any]:
    with open_regular(folder, CONFIG) as file:
        data = file.read(MAX_CONFIG + 1)
    try:
        if len(data) > MAX_CONFIG:
            raise ValueError(f"it has more than {MAX_CONFIG} bytes")
        return jsontext.parse(data)
    except ValueError as error:
        message = f"{CONFIG} cannot be read: {error}."
        fix = "Send the file PEFT's save_pretrained wrote."
        raise InvalidAdapter([Problem("config_json", CONFIG, message, fix)]) from error


def _spec(config: dict[str, Any], header: Weights) -> AdapterSpec:
    reader = _Fields(config)
    rank = reader.take("r", _rank, 8, required=True)
    alpha = reader.take("lora_alpha", _number, 8.0, required=True)
    rank_pattern = reader.take("rank_pattern", _ranks, dict[str, int]())
    alpha_pattern = reader.take("alpha_pattern", _numbers, dict[str, float]())
    nothing: tuple[str, ...] | str = ()
    targets = Targets(
        modules=reader.take("target_modules", _names, nothing, required=True),
        exclude=reader.take("exclude_modules", _names, nothing),
        layers=reader.take("layers_to_transform", _layers, None),
        layers_pattern=reader.take("layers_pattern", _name_or_names, ()),
    )
    modules, unknown = _pairs(header)
    patterns = Patterns()
    return AdapterSpec(
        config=config,
        weights=header,
        modules=modules,
        unknown=unknown,
        peft_type=reader.take("peft_type", _text, "", required=True),
        base_model=reader.take("base_model_name_or_path", _text, None),
        rank=rank,
        alpha=alpha,
        rslora=reader.take("use_rslora", _flag, False),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        ranks=reader.matched("rank_pattern", patterns, rank_pattern, modules),
        alphas=reader.matched("alpha_pattern", patterns, alpha_pattern, modules),
        targets=targets,
        faults=tuple(reader.faults),
    )


def _pairs(header: Weights) -> tuple[dict[str, Pair], tuple[str, ...]]:
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in header.tensors.items():
        if key := _KEY.fullmatch(name):
            found.setdefault(key["module"], {})[key["part"]] = tensor
        else:
            unknown.append(name)
    pairs = {module: Pair(parts.get("A"), parts.get("B")) for module, parts in found.items()}
    return pairs, tuple(unknown)


class _Fields:
    """Takes typed values out of the config and notes what is wrong with them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.faults: list[Problem] = []

    def take(self, key: str, read: Callable[[Any], T], default: T, required: bool = False) -> T:
        """The value of `key` as `read` gives it; `default` for null, absent or unreadable."""
        value = self._config.get(key)
        if value is None:
            if required:
                message = f"The config does not say {key}."
                fix = "Send the config PEFT's save_pretrained wrote."
                self.faults.append(Problem("config_key_missing", key, message, fix))
            return default
        try:
            return read(value)
        except ValueError as error:
            message = f"{key} is {value!r:.80}; it must be {error}."
            self.faults.append(Problem("config_value", key, message, f"Correct {key}."))
            return default

    def matched(
        self, key: str, patterns: Patterns, rules: Mapping[str, T], modules: Mapping[str, Pair]
    ) -> dict[str, T]:
        """The values of `rules` by module."""
        try:
            return per_module(patterns, rules, modules)
        except BadPattern as error:
            fix = "Write plain module names or a simpler pattern."
            self.faults.append(Problem("config_pattern", key, str(error), fix))
            return {}


def _rank(value: Any) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError("a whole number, 1 or more")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise ValueError("a number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return clean(value, 300)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _names(value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return value
    listed = isinstance(value, list) and len(value) <= _MAX_ENTRIES
    if not listed or not all(isinstance(v, str) for v in value):
        raise ValueError(f"a pattern or a list of at most {_MAX_ENTRIES} names")
    return tuple(value)


def _name_or_names(value: Any) -> tuple[str, ...]:
    names = _names(value)
    return ((names,) if names else ()) if isinstance(names, str) else names


def _layers(value: Any) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    if len(values) > _MAX_ENTRIES or not all(type(v) is int for v in values):
        raise ValueError("a layer number or a list of them")
    return frozenset(values)


def _by_pattern(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > _MAX_ENTRIES:
        raise ValueError(f"an object with at most {_MAX_ENTRIES} module names")
    return value


def _ranks(value: Any) -> dict[str, int]:
    return {key: _rank(v) for key, v in _by_pattern(value).items()}


def _numbers(value: Any) -> dict[str, float]:
    return {key: _number(v) for key, v in _by_pattern(value).items()}
