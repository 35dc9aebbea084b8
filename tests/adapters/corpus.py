"""Uploads that are hostile or broken, each with the codes it must be refused with."""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from adapters import validate
from adapters.base import BaseSpec
from adapters.database import Database
from adapters.errors import InvalidAdapter, TooLarge
from adapters.ingest import Ingest, Rules
from adapters.registry import Registry, Version
from adapters.sources import archive, directory
from adapters.sources.intake import Transfer
from adapters.store import Store
from tests.adapters.conftest import LINEARS, NUMPY, Made, bfloat16, make

MAX_BYTES = 2**23
MAX_RANK = 8
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
V1 = "base_model.model.model.layers.1.self_attn.v_proj"
_MLP = "model.layers.0.mlp"
BASE = BaseSpec(
    "tiny",
    {**LINEARS, f"{_MLP}.gate_proj": (24, 16), f"{_MLP}.up_proj": (24, 16)},
    4096,
    8192,
)

Write = Callable[[Path], Path]


# Taking in ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A store and a registry, and the way an upload takes into them."""

    root: Path
    store: Store
    registry: Registry
    ingest: Ingest
    allow_pickle: bool

    def take(self, path: Path) -> Version:
        """An upload of the folder or archive at `path`."""
        with self.store.staging() as folder:
            if path.is_dir() or path.is_symlink():
                directory.copy(path, folder, Transfer(MAX_BYTES), self.allow_pickle)
            else:
                archive.unpack(path, folder, MAX_BYTES, allow_pickle=self.allow_pickle)
            return self.ingest.ingest(folder, "sql", "upload")[0]

    def refusal(self, path: Path) -> set[str]:
        """The codes that `path` is refused with; empty if it is taken."""
        try:
            self.take(path)
        except TooLarge as error:
            return {error.code}
        except InvalidAdapter as error:
            return {problem.code for problem in error.problems}
        return set()

    def clear(self) -> None:
        """Takes out again what was taken in."""
        for name, _ in list(self.registry.names()):
            for digest in self.registry.delete_adapter(name):
                self.ingest.collect(digest)

    def remains(self) -> list[str]:
        """What is in the store and the registry."""
        left = [p for part in ("incoming", "trash") for p in (self.root / "store" / part).iterdir()]
        known = [*self.registry.digests(), *(name for name, _ in self.registry.names())]
        return [*known, *self.store.sealed(), *map(str, left)]


@contextmanager
def place(root: Path, allow_pickle: bool = False) -> Iterator[Place]:
    """An empty one under `root`."""
    store = Store(root / "store")
    registry = Registry(Database.of(root))
    try:
        ingest = Ingest(store, registry, BASE, Rules(MAX_RANK, allow_pickle=allow_pickle))
        yield Place(root, store, registry, ingest, allow_pickle)
    finally:
        registry.close()


# Making ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """`write` makes the upload in an empty folder and returns its path."""

    name: str
    write: Write
    codes: frozenset[str]


def case(name: str, write: Write, *codes: str) -> Case:
    return Case(name, write, frozenset(codes))


def adapter(change: Callable[[Made], object] = lambda made: None, **arguments: Any) -> Write:
    """A folder with the adapter of `make`, after `change`."""

    def write(root: Path) -> Path:
        made = make(**arguments)
        change(made)
        return made.write(root / "adapter")

    return write


def without(*keys: str) -> Write:
    return adapter(lambda made: [made.config.pop(key) for key in keys])


def tensor(name: str, numbers: np.ndarray, dtype: str = "F32") -> Write:
    """The adapter with one more tensor, or another one under this name."""
    return adapter(lambda made: made.tensors.update({name: (dtype, numbers)}))


def dropped(*names: str) -> Write:
    return adapter(lambda made: [made.tensors.pop(name) for name in names])


def file(name: str, content: bytes | Callable[[], bytes]) -> Write:
    """A folder with a good adapter, of which one file has this content."""

    def write(root: Path) -> Path:
        folder = make().write(root / "adapter")
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())
        return folder

    return write


def header(entries: object, data: int = 0) -> Write:
    """Weights with this header, as JSON or as it is, before so many bytes of data."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return file(WEIGHTS, struct.pack("<Q", len(text)) + text + b"\0" * data)


def packed(content: Callable[[], bytes]) -> Write:
    """An archive."""

    def write(root: Path) -> Path:
        (root / "archive").write_bytes(content())
        return root / "archive"

    return write


def folder(change: Callable[[Path], object]) -> Write:
    """A folder with a good adapter, after `change`."""

    def write(root: Path) -> Path:
        made = make().write(root / "adapter")
        change(made)
        return made

    return write


def bits(value: float, dtype: str, shape: tuple[int, int]) -> np.ndarray:
    """Ones, but the last of them is `value`."""
    numbers = np.ones(shape, "<f4")
    numbers[-1, -1] = value
    return bfloat16(numbers) if dtype == "BF16" else numbers.astype(NUMPY[dtype])


# Configs -----------------------------------------------------------------------------------


def _deep(levels: int) -> bytes:
    return b'{"a":' + b"[" * levels + b"]" * levels + b"}"


_TEXTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b"\n \n",
    "list": b"[]",
    "null": b"null",
    "cut short": b'{"r": 4',
    "text after it": b'{"r": 4} {}',
    "single quotes": b"{'r': 4}",
    "comment": b'{"r": 4 /* rank */}',
    "duplicate key": b'{"r": 4, "r": 64}',
    "duplicate key deep down": b'{"a": [{"r": 4, "r": 4}]}',
    "duplicate key by escape": rb'{"r": 4, "\u0072": 64}',
    "NaN": b'{"lora_alpha": NaN}',
    "infinity": b'{"lora_alpha": -Infinity}',
    "number too large": b'{"lora_alpha": 1e999}',
    "number of 5000 digits": b'{"r": ' + b"9" * 5000 + b"}",
    "too deep": _deep(40),
    "far too deep": _deep(100_000),
    "lone surrogate": rb'{"base_model_name_or_path": "\ud800"}',
    "lone surrogate in a key": rb'{"\udfff": 1}',
    "NUL": rb'{"base_model_name_or_path": "a\u0000b"}',
    "Latin-1": '{"a": "é"}'.encode("latin-1"),
    "UTF-16": '{"r": 4}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"r": 4}',
    "overlong UTF-8": b'{"a": "\xc0\xaf"}',
    "binary": bytes(range(256)) * 10,
}

_VALUES: dict[str, tuple[Any, ...]] = {
    "r": ("8", True, 0, -4, 2**31, 4.0, [4]),
    "lora_alpha": ("16", True, 1e31, -1e300, {}),
    "target_modules": (3, [1], {"q_proj": 1}, ["q_proj"] * 10_001, [["q_proj"]]),
    "exclude_modules": (5, [None]),
    "rank_pattern": ([], "q_proj", {"q_proj": 0}, {"q_proj": "4"}),
    "alpha_pattern": ("x", {"q_proj": True}, {f"m{i}": 1 for i in range(10_001)}),
    "use_rslora": (1, "yes"),
    "layers_to_transform": ("all", [True], {"0": 1}, [0.5]),
    "layers_pattern": (3, [[]]),
    "base_model_name_or_path": (7, ["org/Tiny"]),
}

# Values that also keep tensors from being what the config says.
_CONSEQUENCES = {"r": {"rank_not_as_configured"}, "target_modules": {"tensor_outside_targets"}}


def _configs() -> Iterator[Case]:
    for name, text in _TEXTS.items():
        yield case(f"config: {name}", file(CONFIG, text), "config_json")
    huge = b'{"a": "' + b"x" * 2**20 + b'"}'
    yield case("config: huge", file(CONFIG, huge), "too_large")
    for key, values in _VALUES.items():
        for value in values:
            name = f"config: {key} is {value!r:.30}"
            codes = {"config_value", *_CONSEQUENCES.get(key, ())}
            yield case(name, adapter(**{key: value}), *codes)
    for key in ("r", "lora_alpha", "target_modules"):
        codes = {"config_key_missing", *_CONSEQUENCES.get(key, ())}
        yield case(f"config: no {key}", without(key), *codes)
        yield case(f"config: {key} is null", adapter(**{key: None}), *codes)
    yield case("config: no peft_type", without("peft_type"), "peft_type")
    yield case("config: nothing", file(CONFIG, b"{}"), "peft_type")
    for peft_type in ("IA3", "LOHA", "PREFIX_TUNING", "lora", "", 7, "LORA\x1b[31m"):
        name = f"config: peft_type is {peft_type!r}"
        yield case(name, adapter(peft_type=peft_type), "peft_type")
    for key, (code, _, _) in validate._FEATURES.items():
        yield case(f"config: {key}", adapter(**{key: {}}), code)
    for bias in ("all", "lora_only", True, []):
        yield case(f"config: bias is {bias}", adapter(bias=bias), "bias")
    for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq"):
        code = f"init_{init.partition('_')[0]}"
        yield case(f"config: init {init}", adapter(init_lora_weights=init), code)
    yield case(
        "config: init of a kind not known", adapter(init_lora_weights=[1]), "init_unsupported"
    )


# Patterns ----------------------------------------------------------------------------------

_PATTERNS: dict[str, str] = {
    "exponential": "(a+)+$",
    "exponential in an optional": "(?:(?:q_proj)?)*x",
    "polynomial": r"\w*?\W*?" * 20 + r"\d\d",
    "back-references": "(.*)" * 12 + r"\1\2\3\d",
    "POSIX class": r".*\.[[:alpha:]]_proj",
    "recursion": "(?R)?q_proj",
    "recursion by name": "(?P<n>q)(?P>n)",
    "fuzzy": "(?:q_proj){e<=3}",
    "fuzzy by default": "(?e)q_proj",
    "huge counts": "(((a{999}){999}){999})",
    "a hundred groups": "(" * 100 + "q_proj" + ")" * 100,
    "long": "q_proj|" * 1000 + "v_proj",
    "not closed": "(q_proj",
    "only a star": "*",
    "backslash at the end": "q_proj\\",
    "code point out of range": r"\U00110000",
    "look-behind of any width": "(?<=q.*)_proj",
}


def _patterns() -> Iterator[Case]:
    for name, pattern in _PATTERNS.items():
        target = adapter(target_modules=pattern)
        codes = ("config_pattern", "tensor_outside_targets", "target_not_in_base")
        yield case(f"target_modules: {name}", target, *codes)
        yield case(f"rank_pattern: {name}", adapter(rank_pattern={pattern: 4}), "config_pattern")
    for name in ("exponential", "recursion", "not closed"):
        pattern = _PATTERNS[name]
        yield case(f"alpha_pattern: {name}", adapter(alpha_pattern={pattern: 4}), "config_pattern")
        yield case(
            f"exclude_modules: {name}",
            adapter(exclude_modules=pattern),
            "config_pattern",
            "tensor_outside_targets",
        )
        yield case(
            f"layers_pattern: {name}",
            adapter(layers_pattern=pattern, layers_to_transform=[0, 1]),
            "config_pattern",
            "tensor_outside_targets",
        )
    many = {f".*{'.*' * (i % 40)}x{i}": 4 for i in range(10_000)}
    yield case("rank_pattern: ten thousand slow ones", adapter(rank_pattern=many), "config_pattern")


# Headers -----------------------------------------------------------------------------------


def entry(begin: int, end: int, shape: object = None, dtype: object = "U8") -> dict[str, object]:
    """The header's entry for one tensor."""
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


_HEADERS: dict[str, tuple[str, object, int]] = {
    "overlap": ("header_offsets", {"a": entry(0, 4), "b": entry(2, 6)}, 6),
    "the same bytes twice": ("header_offsets", {"a": entry(0, 4), "b": entry(0, 4)}, 4),
    "gap": ("header_offsets", {"a": entry(0, 4), "b": entry(5, 6)}, 6),
    "gap at the start": ("header_offsets", {"a": entry(1, 4)}, 4),
    "trailing bytes": ("weights_trailing", {"a": entry(0, 4)}, 5),
    "no tensors but data": ("weights_trailing", {}, 5),
    "truncated data": ("weights_truncated", {"a": entry(0, 4)}, 3),
    "data far away": ("header_offsets", {"a": entry(2**62, 2**62 + 4)}, 4),
    "a terabyte": ("weights_truncated", {"a": entry(0, 2**40)}, 4),
    "shape too small": ("header_shape", {"a": entry(0, 4, [3])}, 4),
    "type too wide": ("header_shape", {"a": entry(0, 4, [2, 2], "F32")}, 4),
    "product overflows": ("header_shape", {"a": entry(0, 4, [2**32, 2**32])}, 4),
    "product overflows to the size": ("header_shape", {"a": entry(0, 4, [2**62, 4, 2**2, 1])}, 4),
    "empty by one dimension": ("header_shape", {"a": entry(0, 4, [0, 2**62])}, 4),
    "type not known": ("header_dtype", {"a": entry(0, 4, [4], "F4")}, 4),
    "type in lower case": ("header_dtype", {"a": entry(0, 4, [1], "f32")}, 4),
    "type is a number": ("header_entry", {"a": entry(0, 4, [4], 32)}, 4),
    "backwards": ("header_entry", {"a": entry(4, 0, [0])}, 4),
    "negative shape": ("header_entry", {"a": entry(0, 4, [-2, -2])}, 4),
    "negative offset": ("header_entry", {"a": entry(-4, 0, [4])}, 4),
    "boolean shape": ("header_entry", {"a": entry(0, 4, [True, 4])}, 4),
    "fractional shape": ("header_entry", {"a": entry(0, 4, [4.0])}, 4),
    "shape is text": ("header_entry", {"a": entry(0, 4, "4")}, 4),
    "shape is null": ("header_entry", {"a": {**entry(0, 4), "shape": None}}, 4),
    "dimension of 2⁶³": ("header_entry", {"a": entry(0, 0, [2**63, 0])}, 0),
    "forty dimensions": ("header_entry", {"a": entry(0, 1, [1] * 40)}, 1),
    "a million dimensions": ("header_entry", {"a": entry(0, 1, [1] * 10**6)}, 1),
    "three offsets": ("header_entry", {"a": {**entry(0, 4), "data_offsets": [0, 2, 4]}}, 4),
    "entry is a list": ("header_entry", {"a": [0, 4]}, 4),
    "entry is null": ("header_entry", {"a": None}, 4),
    "entry lacks its type": ("header_entry", {"a": {"shape": [4], "data_offsets": [0, 4]}}, 4),
    "entry has more": ("header_entry", {"a": {**entry(0, 4), "more": 1}}, 4),
    "name too long": ("header_name", {"a" * 600: entry(0, 4)}, 4),
    "name of a megabyte": ("header_name", {"a" * 2**20: entry(0, 4)}, 4),
    "metadata is no text": ("header_metadata", {"__metadata__": {"a": 1}}, 0),
    "metadata is a list": ("header_metadata", {"__metadata__": []}, 0),
    "metadata is null": ("header_metadata", {"__metadata__": None}, 0),
    "duplicate tensor": ("header_json", b'{"a":1,"a":2}', 0),
    "duplicate metadata": ("header_json", b'{"__metadata__":{},"__metadata__":{}}', 0),
    "blank before": ("header_json", b" {}", 0),
    "list": ("header_json", b"[]", 0),
    "not JSON": ("header_json", b"{tensors}", 0),
    "NaN": ("header_json", b'{"a":NaN}', 0),
    "too deep": ("header_json", _deep(40), 0),
    "far too deep": ("header_json", b"{" * 50_000, 0),
    "number of 5000 digits": ("header_json", b'{"a":' + b"9" * 5000 + b"}", 0),
    "number too large": ("header_json", b'{"a":1e999}', 0),
    "lone surrogate": ("header_json", rb'{"a\ud800":1}', 0),
    "NUL": ("header_json", rb'{"a\u0000":1}', 0),
    "not UTF-8": ("header_json", b'{"\xff":1}', 0),
}

_LENGTHS: dict[str, tuple[str, bytes]] = {
    "empty": ("weights_truncated", b""),
    "seven bytes": ("weights_truncated", b"\0" * 7),
    "no header": ("header_json", b"\0" * 8),
    "header of no bytes": ("header_json", b"\0" * 8 + b"{}"),
    "header one byte past the end": ("header_length", struct.pack("<Q", 3) + b"{}"),
    "header of a gigabyte": ("header_length", struct.pack("<Q", 2**30) + b"{}"),
    "header of 2⁶⁴ bytes": ("header_length", b"\xff" * 8 + b"{}"),
    "big-endian length": ("header_length", struct.pack(">Q", 2) + b"{}"),
    "a zip": ("header_length", b"PK\x03\x04" + b"\0" * 60),
    "a pickle": ("header_length", b"\x80\x02}q\0." + b"\0" * 60),
}


def _headers() -> Iterator[Case]:
    for name, (code, entries, data) in _HEADERS.items():
        yield case(f"header: {name}", header(entries, data), code)
    for name, (code, content) in _LENGTHS.items():
        yield case(f"weights: {name}", file(WEIGHTS, content), code)
    broken = {"a": entry(0, 4, [3]), "b": entry(4, 8, [4], "F4"), "c": 1, "__metadata__": 0}
    yield case(
        "header: several faults",
        header(broken, 8),
        "header_shape",
        "header_dtype",
        "header_entry",
        "header_metadata",
    )
    cut = make().weights()[:-1]
    yield case("weights: last byte missing", file(WEIGHTS, cut), "weights_truncated")
    yield case(
        "weights: one byte more", file(WEIGHTS, make().weights() + b"\0"), "weights_trailing"
    )
    yield case("weights: too many bytes", file(WEIGHTS, lambda: b"\0" * MAX_BYTES), "too_large")
    both = folder(lambda f: [(f / CONFIG).write_text("x"), (f / WEIGHTS).write_text("too short")])
    yield case("config and weights broken", both, "config_json", "header_length")


# Tensors -----------------------------------------------------------------------------------

_ONES = np.ones((4, 16), "<f4")

_NAMES: dict[str, tuple[str, str]] = {
    "adapter's name in it": ("adapter_name_in_key", f"{Q0}.lora_A.default.weight"),
    "adapter's name at the end": ("adapter_name_in_key", f"{Q0}.lora_A.default"),
    "DoRA's magnitude": ("dora", f"{Q0}.lora_magnitude_vector"),
    "DoRA's magnitude, older": ("dora", f"{Q0}.lora_magnitude_vector.weight"),
    "bias of B": ("lora_bias", f"{Q0}.lora_B.bias"),
    "KaSA": ("kasa", f"{Q0}.lora_diag"),
    "LoRA on the embedding": (
        "embedding_lora",
        "base_model.model.model.embed_tokens.lora_embedding_A",
    ),
    "whole output layer": ("embedding_weights", "base_model.model.lm_head.weight"),
    "whole embedding": (
        "embedding_weights",
        "base_model.model.model.embed_tokens.base_layer.weight",
    ),
    "trained tokens": (
        "trainable_tokens",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    ),
    "other prefix": ("tensor_prefix", "model.layers.0.self_attn.q_proj.lora_A.weight"),
    "bias of the base": ("unknown_tensor", "base_model.model.model.layers.0.self_attn.q_proj.bias"),
    "control characters": ("unknown_tensor", "what\nis\x1b[31mthis"),
    "no name": ("unknown_tensor", ""),
    "a path": ("unknown_tensor", "../../etc/passwd"),
    "newline at the end": ("unknown_tensor", f"{Q0}.lora_A.weight\n"),
}


def _tensors() -> Iterator[Case]:
    for name, (code, key) in _NAMES.items():
        yield case(f"tensor: {name}", tensor(key, _ONES), code)
    for part in "AB":
        name = f"{Q0}.lora_{part}.weight"
        yield case(f"tensor: {part} missing", dropped(name), "factor_missing")
    yield case(
        "tensors: none",
        adapter(lambda made: made.tensors.clear()),
        "no_tensors",
        "target_without_tensors",
    )
    yield case(
        "rank: A and B differ", tensor(f"{V1}.lora_B.weight", _ONES[:3, :8].T), "rank_inconsistent"
    )
    yield case("rank: not as configured", adapter(r=2), "rank_not_as_configured")
    pattern = {"layers.0.self_attn.q_proj": 6}
    yield case("rank: not as its pattern", adapter(rank_pattern=pattern), "rank_not_as_configured")
    yield case("rank: above the maximum", adapter(rank=9), "rank_above_max")
    yield case(
        "rank: above the maximum in a pattern",
        adapter(rank_pattern={"k_proj": 2**31 - 1}),
        "rank_above_max",
    )
    one = f"{Q0}.lora_A.weight"
    yield case("shape: A of another base", tensor(one, _ONES[:, :15]), "shape_mismatch")
    yield case(
        "shape: B of another base",
        tensor(f"{V1}.lora_B.weight", np.ones((16, 4), "<f4")),
        "shape_mismatch",
    )
    yield case(
        "shape: A transposed",
        tensor(one, _ONES.T),
        "rank_inconsistent",
        "rank_above_max",
        "shape_mismatch",
    )
    yield case("shape: one dimension", tensor(one, _ONES[0]), "not_a_matrix")
    yield case("shape: three dimensions", tensor(one, _ONES[..., None]), "not_a_matrix")
    yield case("shape: a number", tensor(one, np.ones((), "<f4")), "not_a_matrix")
    yield case("shape: no rows", tensor(one, _ONES[:0]), "not_a_matrix", "rank_inconsistent")
    yield case("shape: no columns", tensor(one, _ONES[:, :0]), "not_a_matrix", "shape_mismatch")
    for dtype in ("F64", "I32", "U8", "BOOL", "F8_E4M3"):
        numbers = np.ones((4, 16), {**NUMPY, "BOOL": "u1"}.get(dtype, "u1"))
        yield case(f"dtype: {dtype}", tensor(one, numbers, dtype), "dtype_unsupported")
    yield from _numbers()


def _numbers() -> Iterator[Case]:
    for dtype in ("F32", "F16", "BF16"):
        for value in (np.nan, np.inf, -np.inf):
            for name, shape in ((f"{Q0}.lora_A.weight", (4, 16)), (f"{V1}.lora_B.weight", (8, 4))):
                write = tensor(name, bits(value, dtype, shape), dtype)
                yield case(f"numbers: {value} in {dtype} {name[-8]}", write, "nonfinite")
    large = adapter(
        lambda made: made.tensors.update(
            {f"{V1}.lora_B.weight": ("F32", np.full((8, 4), 1e10, "<f4"))}
        ),
        lora_alpha=9e29,
    )
    yield case("numbers: too large once scaled", large, "overflow")
    zero = adapter(
        lambda made: [array[1].fill(0) for name, array in made.tensors.items() if "lora_B" in name]
    )
    yield case("numbers: B is zero", zero, "no_effect")
    yield case("numbers: alpha is zero", adapter(lora_alpha=0), "no_effect")


# Targets -----------------------------------------------------------------------------------


def _targets() -> Iterator[Case]:
    elsewhere = {f"transformer.h.{i}.attn.c_attn": (48, 16) for i in range(300)}
    yield case(
        "modules: all of another model",
        adapter(modules=elsewhere, target_modules=["c_attn"]),
        "module_not_in_base",
        "target_not_in_base",
    )
    more = {**elsewhere, "model.layers.0.self_attn.q_proj": (16, 16)}
    yield case(
        "modules: most of another model",
        adapter(modules=more, target_modules=["c_attn", "q_proj"]),
        "module_not_in_base",
        "target_not_in_base",
    )
    layer = {
        "model.layers.2.self_attn.q_proj": (16, 16),
        "model.layers.1.self_attn.q_proj": (16, 16),
    }
    yield case(
        "modules: a layer too many",
        adapter(modules=layer, target_modules=["q_proj"]),
        "module_not_in_base",
    )
    head = adapter(modules={"lm_head": (64, 16)}, target_modules=["lm_head"])
    yield case("modules: the output layer", head, "embedding_lora")
    fused = {f"{_MLP}.gate_up_proj": (48, 16), f"{_MLP}.up_proj": (24, 16)}
    yield case(
        "modules: fused and apart",
        adapter(modules=fused, target_modules=["gate_up_proj", "up_proj"]),
        "fused_and_apart",
    )
    outside = ("tensor_outside_targets",)
    yield case("targets: too few", adapter(target_modules=["q_proj"]), *outside)
    yield case("targets: excluded", adapter(exclude_modules=["v_proj"]), *outside)
    yield case("targets: other layers", adapter(layers_to_transform=[1]), *outside)
    yield case("targets: none", adapter(target_modules=[]), *outside)
    yield case(
        "targets: one unknown",
        adapter(target_modules=["q_proj", "v_proj", "nowhere"]),
        "target_not_in_base",
    )
    yield case(
        "targets: a pattern that matches nothing",
        adapter(target_modules=r".*\.nowhere"),
        "target_not_in_base",
        *outside,
    )
    yield case(
        "targets: all unknown",
        adapter(target_modules=["x", "y", "__proto__"]),
        "target_not_in_base",
        *outside,
    )
    yield case(
        "targets: without tensors",
        adapter(modules={"model.layers.0.self_attn.q_proj": (16, 16)}),
        "target_without_tensors",
    )


def _combined() -> Iterator[Case]:
    def change(made: Made) -> None:
        made.tensors[f"{Q0}.lora_magnitude_vector"] = ("F32", np.ones(16, "<f4"))
        made.tensors[f"{Q0}.lora_A.weight"] = ("I32", np.ones((9, 15), "<i4"))
        del made.tensors[f"{V1}.lora_A.weight"]

    yield case(
        "everything at once",
        adapter(change, rank=9, use_dora=True, bias="all", r="x", init_lora_weights="pissa"),
        "config_value",
        "dora",
        "bias",
        "init_pissa",
        "factor_missing",
        "dtype_unsupported",
        "rank_not_as_configured",
        "rank_above_max",
        "shape_mismatch",
    )
    yield case(
        "feature in the config and in a tensor",
        adapter(
            lambda made: made.tensors.update({f"{Q0}.lora_magnitude_vector": ("F32", _ONES[0])}),
            use_dora=True,
        ),
        "dora",
    )


# Archives ----------------------------------------------------------------------------------

KINDS = ("zip", "tar", "tar.gz", "tar.zst")

Entries = list[tuple[str, bytes]]


def good() -> Entries:
    """The entries of an archive that is taken."""
    made = make()
    return [(CONFIG, json.dumps(made.config).encode()), (WEIGHTS, made.weights())]


def pack(kind: str, entries: Entries) -> bytes:
    """An archive of these names and contents; names are not changed, not even `..`."""
    made = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as opened:
            for name, content in entries:
                opened.writestr(_named(name), content)
        return made.getvalue()
    with tarfile.open(fileobj=made, mode="w") as opened:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return compressed(kind, made.getvalue())


def compressed(kind: str, data: bytes) -> bytes:
    """The tar `data` as an archive of this kind."""
    if kind == "tar.gz":
        return gzip.compress(data, 1, mtime=0)
    if kind == "tar.zst":
        return zstandard.ZstdCompressor(1, write_checksum=True).compress(data)
    return data


def _named(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename = name
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def tar(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of these headers, each with its data, whatever its header says of it."""
    blocks = [h.tobuf(format) + data + b"\0" * (-len(data) % 512) for h, data in members]
    return b"".join(blocks) + b"\0" * 1024


def member(name: str, **fields: Any) -> tarfile.TarInfo:
    """The header of a tar's entry."""
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def _archives() -> Iterator[Case]:
    for kind in KINDS:
        for name, (codes, entries) in _CONTENTS.items():
            write = packed(lambda kind=kind, entries=entries: pack(kind, entries()))
            yield case(f"{kind}: {name}", write, *codes)
        for name, change in _DAMAGES.items():
            write = packed(lambda kind=kind, change=change: change(pack(kind, good())))
            yield case(f"{kind}: {name}", write, "archive_broken")
    for name, content in (("empty zip", pack("zip", [])), ("gzip of nothing", gzip.compress(b""))):
        yield case(f"archive: {name}", packed(lambda content=content: content), "archive_broken")
    yield case("archive: empty tar", packed(lambda: pack("tar", [])), *_NO_FILES)
    yield case("archive: empty", packed(bytes), "archive_broken")
    yield case("archive: text", packed(lambda: b"hello " * 500), "archive_broken")
    yield from _zips()
    yield from _tars()


_NO_FILES = {"config_missing", "weights_missing"}

_CONTENTS: dict[str, tuple[set[str], Callable[[], Entries]]] = {
    "..": ({"archive_path"}, lambda: [*good(), ("../evil", b"x")]),
    ".. inside": ({"archive_path"}, lambda: [*good(), ("a/../../evil", b"x")]),
    "absolute": ({"archive_path"}, lambda: [("/" + CONFIG, b"{}"), *good()]),
    "backslash": ({"archive_path"}, lambda: [("..\\evil", b"x"), *good()]),
    "drive": ({"archive_path"}, lambda: [("C:evil", b"x"), *good()]),
    "the same twice": ({"archive_duplicate"}, lambda: [*good(), ("./" + CONFIG, b"{}")]),
    "the same twice, skipped": ({"archive_duplicate"}, lambda: [("a", b""), (".//a", b"")]),
    "several adapters": (
        {"archive_several"},
        lambda: [(f"{where}/{n}", c) for where in "ab" for n, c in good()],
    ),
    "adapter in a checkpoint too": (
        {"archive_several"},
        lambda: [*good(), *((f"checkpoint-5/{n}", c) for n, c in good())],
    ),
    "config and weights apart": (
        {"archive_several"},
        lambda: [(f"{i}/{n}", c) for i, (n, c) in enumerate(good())],
    ),
    "other files": (_NO_FILES, lambda: [("README.md", b"x"), ("adapter_config.json.bak", b"{}")]),
    "config only": ({"weights_missing"}, lambda: good()[:1]),
    "weights only": ({"config_missing"}, lambda: good()[1:]),
    "pickle": ({"pickle_refused"}, lambda: [good()[0], ("adapter_model.bin", b"\x80\x02.")]),
    "pickle elsewhere": (
        {"config_missing", "pickle_refused"},
        lambda: [("pytorch_model.pt", b"\x80\x02.")],
    ),
    "bomb": ({"too_large"}, lambda: [good()[0], (WEIGHTS, b"\0" * 5 * MAX_BYTES)]),
    "bomb of a config": ({"too_large"}, lambda: [(CONFIG, b" " * 2**22), good()[1]]),
    "too many entries": ({"too_large"}, lambda: [(str(i), b"") for i in range(1001)]),
    "hostile config": ({"config_json"}, lambda: [(CONFIG, _deep(1000)), good()[1]]),
    "hostile weights": ({"header_length"}, lambda: [good()[0], (WEIGHTS, b"\xff" * 100)]),
}

_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a third of it": lambda data: data[: len(data) // 3],
    "first 100 bytes": lambda data: data[:100],
    "first bytes lost": lambda data: data[:8] + data[16:],
}


# Zips --------------------------------------------------------------------------------------


def zipped(change: Callable[[zipfile.ZipInfo], object], content: bytes = b"{}") -> Write:
    """A zip with one entry whose description is changed before it is written."""

    def build() -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as opened:
            info = _named(CONFIG)
            change(info)
            opened.writestr(info, content)
        return made.getvalue()

    return packed(build)


def _mode(kind: int) -> Callable[[zipfile.ZipInfo], object]:
    return lambda info: setattr(info, "external_attr", (kind | 0o644) << 16)


def patched(signature: bytes, offset: int, value: bytes) -> Write:
    """A good zip in which bytes behind the first `signature` are replaced."""

    def build() -> bytes:
        data = bytearray(pack("zip", good()))
        at = data.index(signature) + offset
        data[at : at + len(value)] = value
        return bytes(data)

    return packed(build)


LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def _zips() -> Iterator[Case]:
    kinds = {"link": stat.S_IFLNK, "fifo": stat.S_IFIFO, "device": stat.S_IFCHR}
    for name, kind in kinds.items():
        yield case(f"zip: {name}", zipped(_mode(kind), b"/etc/passwd"), "archive_special")
    lies = {
        "encrypted": patched(CENTRAL, 8, b"\1\0"),
        "strongly encrypted": patched(CENTRAL, 8, b"\x41\0"),
        "patch data": patched(CENTRAL, 8, b"\x20\0"),
        "method not known": patched(CENTRAL, 10, b"\x63\0"),
        "method is LZMA": patched(CENTRAL, 10, b"\x0e\0"),
        "CRC wrong": patched(CENTRAL, 16, b"\0\0\0\0"),
        "size too small": patched(CENTRAL, 24, b"\1\0\0\0"),
        "offset past the end": patched(CENTRAL, 42, b"\xf0\xff\xff\x7f"),
        "offset of a zip64 that has none": patched(CENTRAL, 42, b"\xff" * 4),
        "name differs in the two headers": patched(LOCAL, 30, b"evil"),
        "contents past the end": patched(END, 16, b"\xf0\xff\xff\x7f"),
        "contents too long": patched(END, 12, b"\xf0\xff\xff\x7f"),
        "zip64 end that is not there": patched(END, 8, b"\xff" * 12),
        "version from the future": patched(CENTRAL, 6, b"\xff\0"),
        "only an end": packed(lambda: pack("zip", good())[-22:]),
        "last byte missing": packed(lambda: pack("zip", good())[:-1]),
        "table of contents of 2 MB": packed(
            lambda: pack("zip", [(f"{'n' * 2000}{i}", b"") for i in range(1000)])
        ),
    }
    for name, write in lies.items():
        yield case(f"zip: {name}", write, "archive_broken")


# Tars --------------------------------------------------------------------------------------


def _tars() -> Iterator[Case]:
    special = {
        "symlink": tarfile.SYMTYPE,
        "hardlink": tarfile.LNKTYPE,
        "character device": tarfile.CHRTYPE,
        "block device": tarfile.BLKTYPE,
        "fifo": tarfile.FIFOTYPE,
        "sparse": tarfile.GNUTYPE_SPARSE,
    }
    for name, kind in special.items():
        entry = member(CONFIG, type=kind, linkname="/etc/passwd")
        write = packed(lambda entry=entry: tar((entry, b"")))
        yield case(f"tar: {name}", write, "archive_special")
    behind = member(f"x/{CONFIG}", type=tarfile.SYMTYPE, linkname="../../evil")
    yield case(
        "tar: link and a file through it",
        packed(lambda: tar((behind, b""), (member(f"x/{CONFIG}", size=2), b"{}"))),
        "archive_special",
    )
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40)}
    yield case("tar: sparse by pax", _pax(sparse), "archive_broken")
    headers = {
        "negative size": _sized(-1),
        "very negative size": _sized(-(2**40)),
        "size past the end": _sized(2**20),
        "size of 2⁶⁰": _sized(2**60),
        "pax of a gigabyte": _meta(tarfile.XHDTYPE, 2**30),
        "global pax of a gigabyte": _meta(tarfile.XGLTYPE, 2**30),
        "long name of a gigabyte": _meta(tarfile.GNUTYPE_LONGNAME, 2**30),
        "pax without a length": _meta(tarfile.XHDTYPE, 8, b"path=evil"[:8]),
        "pax with a length of zero": _meta(tarfile.XHDTYPE, 9, b"0 path=x\n"),
        "pax with a length too long": _meta(tarfile.XHDTYPE, 11, b"999 path=x\n"),
        "pax size that is no number": _pax({"size": "much"}),
        "pax size below zero": _pax({"size": "-512"}),
    }
    for name, write in headers.items():
        yield case(f"tar: {name}", write, *_TAR_CODES.get(name, {"archive_broken"}))
    for kind, size in (("tar.gz", 8), ("tar.zst", 4)):
        wrong = packed(lambda kind=kind, size=size: pack(kind, good())[:-size] + b"\0" * size)
        yield case(f"{kind}: checksum wrong", wrong, "archive_broken")
    yield case("tar.zst: window of 512 MiB", packed(_wide_zstd), "archive_broken")
    yield case("tar.zst: of a dictionary", packed(_zstd_of_a_dictionary), "archive_broken")
    yield case("tar: path by pax", _pax({"path": "../../evil"}), "archive_path")
    yield case("tar: path by long name", packed(_long_name), "archive_path")
    yield case("tar: pax headers without end", packed(_many_pax), "archive_broken")


# What tarfile passes over or takes literally.
_TAR_CODES: dict[str, set[str]] = {
    "pax without a length": {"weights_missing"},
    "pax with a length too long": {"archive_path"},
    "pax size that is no number": {"weights_missing"},
}


def _sized(size: int) -> Write:
    return packed(lambda: tar((member(CONFIG, size=size), b"")))


def _meta(kind: bytes, size: int, data: bytes = b"") -> Write:
    entry = member("meta", type=kind, size=size)
    return packed(lambda: tar((entry, data), (member(CONFIG, size=2), b"{}")))


def _pax(headers: dict[str, str]) -> Write:
    entry = member(CONFIG, size=2, pax_headers=headers)
    return packed(lambda: tar((entry, b"{}"), format=tarfile.PAX_FORMAT))


def _wide_zstd() -> bytes:
    wide = zstandard.ZstdCompressionParameters(window_log=29)
    stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    return stream.compress(pack("tar", good())) + stream.flush()


def _zstd_of_a_dictionary() -> bytes:
    words = zstandard.ZstdCompressionDict(pack("tar", good()))
    return zstandard.ZstdCompressor(dict_data=words).compress(pack("tar", good()))


def _long_name() -> bytes:
    name = b"../" * 100 + b"evil\0"
    long = member("long", type=tarfile.GNUTYPE_LONGNAME, size=len(name))
    return tar((long, name), (member("x", size=2), b"{}"))


def _many_pax() -> bytes:
    record = b"30 comment=" + b"x" * 18 + b"\n"
    one = tar((member("meta", type=tarfile.XHDTYPE, size=len(record)), record))[:-1024]
    return gzip.compress(one * 20_000)


# Folders -----------------------------------------------------------------------------------


def _replaced(name: str, make_it: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        (root / name).rename(root.parent / "elsewhere")
        make_it(root / name)

    return change


def _folders() -> Iterator[Case]:
    special: dict[str, Callable[[Path], object]] = {
        "link": lambda path: path.symlink_to(path.parent.parent / "elsewhere"),
        "link to nothing": lambda path: path.symlink_to("nowhere"),
        "link to itself": lambda path: path.symlink_to(path),
        "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "fifo": os.mkfifo,
        "folder": Path.mkdir,
        "socket": _socket,
    }
    for name, make_it in special.items():
        for each in (CONFIG, WEIGHTS):
            write = folder(_replaced(each, make_it))
            yield case(f"folder: {each} is a {name}", write, "not_a_regular_file")
    yield case("folder: empty", folder(_emptied), *_NO_FILES)
    yield case("folder: no config", folder(lambda f: (f / CONFIG).unlink()), "config_missing")
    yield case("folder: no weights", folder(lambda f: (f / WEIGHTS).unlink()), "weights_missing")
    for name in ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"):
        rename = folder(lambda f, name=name: (f / WEIGHTS).rename(f / name))
        yield case(f"folder: {name}", rename, "pickle_refused")
    yield case("folder: a link to one", _linked, "not_a_folder")


def _emptied(root: Path) -> None:
    for path in root.iterdir():
        path.unlink()


def _socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def _linked(root: Path) -> Path:
    (root / "link").symlink_to(make().write(root / "adapter"))
    return root / "link"


CASES: tuple[Case, ...] = (
    *_configs(),
    *_patterns(),
    *_headers(),
    *_tensors(),
    *_targets(),
    *_combined(),
    *_archives(),
    *_folders(),
)
