"""Damaged and made-up uploads for a minute: each is taken or refused, cleanly, soon and in little
memory.

FUZZ_SECONDS is how long all of it takes, 30 if not set. An input is made of a seed and its number
alone; a failure says which to set (FUZZ_SEED, FUZZ_FIRST) for it to come first.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from adapters import demo, peft, validate
from adapters.errors import InvalidAdapter, TooLarge
from adapters.store import digest
from tests.adapters.conftest import NUMPY, Made, bfloat16, make
from tests.adapters.corpus import CONFIG, KINDS, WEIGHTS, Entries, Place, compressed, pack, place

SECONDS = float(os.environ.get("FUZZ_SECONDS", 30))
SEED = int(os.environ.get("FUZZ_SEED", 0)) or int.from_bytes(os.urandom(4), "big")
FIRST = int(os.environ.get("FUZZ_FIRST", 0))

_MOST_S = 5.0  # of this thread's time, for one input
_MOST_BYTES = 128 * 2**20  # more than before, for one input

# What PEFT wrote for a real adapter.
_REAL: dict[str, Any] = json.loads((demo.WEIGHTS / "sql" / CONFIG).read_text())


# Values ------------------------------------------------------------------------------------

_NUMBERS = (
    *(0, 1, -1, 2, 4, 7, 8, 9, 16, 127, 128, 255, 256, 512, 4096, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30),
)
_TEXTS = (
    *("", "LORA", "q_proj", "v_proj", "lm_head", "all-linear", "none", "all", "true", "__class__"),
    *("a" * 600, "\u202e", "é", "\ud800", "\0", "..", "/", "model.layers.0.self_attn.q_proj"),
)
_PIECES = (
    *(".*", "q_proj", "v_proj", ".", r"\.", r"\d", r"\w", "(", ")", "(?:", "(?=", "(?<=", "(?!"),
    *("(?P<a>", "(?P=a)", r"\1", "|", "[", "]", "[^.]", "{2,3}", "{1,99}", "{e<2}", "+", "?", "*"),
    *("^", "$", "\\", r"\b", r"\p{L}", "[[:alpha:]]", "(?i)", "(?R)", "(?1)", "&&", "x", "layers"),
)
_TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"null", b"true", b"NaN", b"-", b".", b"e9"),
    *(b"0", b"1e999", b"9" * 400, rb"\ud800", rb"\u0000", b"\xff", b"\0", b"..", b"/", b" ", b"\n"),
    *(b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"ustar\0", b"[" * 100, b'{"a":' * 50),
    *(b"__metadata__", b"lora_A", b"lora_B", b".weight", b"F32", b"I64", b"shape"),
)


def number(rng: Random) -> int:
    return rng.choice(_NUMBERS) + rng.choice((0, 0, 0, 1, -1))


def real(rng: Random) -> float:
    return rng.choice((0.0, -0.5, 1e-300, 1e-30, 3.4e38, 1e29, -1e30, 1e300, 0.1, rng.random()))


def pattern(rng: Random) -> str:
    return "".join(rng.choices(_PIECES, k=rng.randint(1, 12)))


def value(rng: Random, depth: int = 0) -> Any:
    """Something that JSON can say."""
    if depth < 3 and rng.random() < 0.3:
        several = [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
        return several if rng.random() < 0.5 else {rng.choice(_TEXTS): each for each in several}
    plain = (number(rng), real(rng), pattern(rng), rng.choice(_TEXTS), rng.random() < 0.5, None)
    return rng.choice(plain)


def packed(rng: Random) -> bytes:
    """A number as machines write it."""
    width = rng.choice((1, 2, 4, 8))
    return (number(rng) % 256**width).to_bytes(width, rng.choice(("little", "big")))


def damaged(rng: Random, data: bytes) -> bytes:
    """`data` with a few bytes changed, lost, doubled or put in."""
    for _ in range(rng.randint(1, 4)):
        data = _edited(rng, data)
    return data


def _edited(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + rng.choice((1, 2, 8, 64, 512)))
    before, part, rest = data[:at], data[at:to], data[to:]
    new = rng.choice((rng.choice(_TOKENS), packed(rng), rng.randbytes(rng.randint(1, 8))))
    flipped = bytes(b ^ 1 << rng.randrange(8) for b in part)
    elsewhere = rng.randrange(len(data) + 1)
    return rng.choice(
        (
            before + flipped + rest,
            before + rest,
            before + part + part + rest,
            before + new + part + rest,
            before + new + data[at + len(new) :],
            data[:elsewhere] + part + data[elsewhere:],
            before if rng.random() < 0.2 else data + part,
        )
    )


def perhaps(rng: Random, data: bytes, chance: float) -> bytes:
    """`data`, damaged now and then."""
    return damaged(rng, data) if rng.random() < chance else data


# Adapters ----------------------------------------------------------------------------------


def adapter(rng: Random) -> Made:
    """A good one."""
    dtype = rng.choice(("F32", "F16", "BF16"))
    made = make(rank=rng.choice((1, 4, 8)), seed=rng.randrange(2**32), dtype=dtype)
    made.config = {**_REAL, **made.config}
    return made


def bend_config(rng: Random, made: Made) -> None:
    """Says something else in one place."""
    known = sorted(validate._UNDERSTOOD | validate._FEATURES.keys())
    key = rng.choice([*known, *made.config, rng.choice(_TEXTS)])
    modules = [pattern(rng), "q_proj", "v_proj", rng.choice(_TEXTS)]
    few = rng.sample(modules, rng.randint(0, 3))
    made.config[key] = rng.choice(
        (
            lambda: value(rng),
            lambda: few,
            lambda: pattern(rng),
            lambda: {name: number(rng) for name in few},
            lambda: {name: real(rng) for name in few},
        )
    )()
    if rng.random() < 0.2:
        del made.config[key]


_DTYPES = (*NUMPY, "F8_E4M3", "U8", "BOOL", "I64", "F4", "f32", "")


def special(rng: Random, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of which some are at the ends of what float32 can say."""
    numbers = np.array([rng.gauss(0, 1) for _ in range(int(np.prod(shape)))], "<f4")
    if numbers.size and rng.random() < 0.5:
        ends = (0.0, np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 65504.0, 65520.0)
        numbers[rng.randrange(numbers.size) :] = rng.choice(ends)
    return numbers.reshape(shape)


def bend_tensors(rng: Random, made: Made) -> None:
    """Loses, renames, doubles or rewrites one tensor."""
    if not made.tensors:
        return
    name = rng.choice(list(made.tensors))
    dtype, numbers = made.tensors[name]
    kind = rng.randrange(6)
    if kind == 0:
        del made.tensors[name]
    elif kind == 1:
        parts = name.split(".")
        parts[rng.randrange(len(parts))] = rng.choice((*_TEXTS, "lora_A", "lora_B", "weight", "1"))
        made.tensors[".".join(parts)] = made.tensors.pop(name)
    elif kind == 2:
        parts = list(numbers.shape)
        shape = tuple(rng.choice((0, 1, 2, 4, 8, 16, 17)) for _ in parts[rng.randrange(2) :])
        made.tensors[name] = ("F32", special(rng, shape))
    elif kind == 3:
        numbers = special(rng, numbers.shape)
        with np.errstate(over="ignore"):
            bits = bfloat16(numbers) if dtype == "BF16" else numbers.astype(NUMPY.get(dtype, "<f4"))
        made.tensors[name] = (dtype, bits)
    elif kind == 4:
        made.tensors[name] = (rng.choice(_DTYPES), numbers)
    else:
        made.tensors[name + rng.choice(("", ".bias", "2", "\n"))] = (dtype, numbers.T.copy())


def bend_entry(rng: Random, header: dict[str, Any]) -> None:
    """Says something else of one tensor in a header."""
    name = rng.choice(list(header))
    entry = header[name]
    kind = rng.randrange(5)
    if kind == 0 or not isinstance(entry, dict):
        header[name] = value(rng)
    elif kind == 1:
        entry[rng.choice((*entry, "more"))] = value(rng)
    elif kind == 2 and isinstance(entry.get("shape"), list):
        entry["shape"].insert(0, number(rng))
    elif kind == 3 and isinstance(entry.get("data_offsets"), list):
        entry["data_offsets"] = [max(0, number(rng)), max(0, number(rng))]
    else:
        header[rng.choice(_TEXTS)] = header.pop(name)


def put(root: Path, config: bytes, weights: bytes) -> Path:
    folder = root / "adapter"
    folder.mkdir()
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    return folder


def text(config: dict[str, Any]) -> bytes:
    return json.dumps(config).encode()


# Inputs ------------------------------------------------------------------------------------


def configs(rng: Random, root: Path) -> Path:
    """A good adapter with another config."""
    made = adapter(rng)
    for _ in range(rng.randint(0, 3)):
        bend_config(rng, made)
    return put(root, perhaps(rng, text(made.config), 0.4), made.weights())


def headers(rng: Random, root: Path) -> Path:
    """A good adapter whose weights have another header."""
    made = adapter(rng)
    header = made.header()
    for _ in range(rng.randint(0, 2)):
        bend_entry(rng, header)
    words = perhaps(rng, text(header), 0.4)
    length = packed(rng) if rng.random() < 0.1 else struct.pack("<Q", len(words))
    data = b"".join(numbers.tobytes() for _, numbers in made.tensors.values())
    return put(root, text(made.config), length + words + data)


def weights(rng: Random, root: Path) -> Path:
    """A good adapter with other tensors, and bytes lost or changed on the way."""
    made = adapter(rng)
    for _ in range(rng.randint(0, 2)):
        bend_tensors(rng, made)
    if rng.random() < 0.3:
        bend_config(rng, made)
    return put(root, text(made.config), perhaps(rng, made.weights(), 0.4))


_PLACES = ("", "./", "a/", "a/b/", "../", "/", "C:", "a\\", "a//", "ü/", "\0", "a" * 300 + "/")
_OTHERS = (CONFIG, WEIGHTS, "adapter_model.bin", "README.md", "", ".", "..", "x" * 5000, "a\nb")


def archives(rng: Random, root: Path) -> Path:
    """An archive of a good adapter, with entries bent and then its bytes."""
    made = adapter(rng)
    where = rng.choice(_PLACES[:4])
    entries: Entries = [(where + CONFIG, text(made.config)), (where + WEIGHTS, made.weights())]
    for _ in range(rng.choice((0, 0, 0, 1, 3))):
        name = rng.choice(_PLACES) + rng.choice(_OTHERS)
        entries.insert(rng.randrange(len(entries) + 1), (name, rng.choice(_TOKENS)))
    kind = rng.choice(KINDS)
    (root / "archive").write_bytes(_archive(rng, kind, entries))
    return root / "archive"


def _archive(rng: Random, kind: str, entries: Entries) -> bytes:
    if kind == "zip":
        data = pack("zip", entries)
        for _ in range(rng.randint(0, 2)):
            data = bend_zip(rng, data)
        return perhaps(rng, data, 0.3)
    data = pack("tar", entries)
    for _ in range(rng.randint(0, 2)):
        data = bend_tar(rng, data)
    data = perhaps(rng, data, 0.3)
    return data if kind == "tar" else perhaps(rng, compressed(kind, data), 0.3)


# Signature → where its fields are: offset and width.
_ZIP = {
    b"PK\x03\x04": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2), (30, 8)),
    b"PK\x01\x02": (
        *((4, 2), (6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2)),
        *((34, 2), (38, 4), (42, 4), (46, 8)),
    ),
    b"PK\x05\x06": ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
}


def bend_zip(rng: Random, data: bytes) -> bytes:
    """Another number in a field of one of a zip's records."""
    signature = rng.choice(list(_ZIP))
    places = [i for i in range(len(data)) if data.startswith(signature, i)]
    if not places:
        return data
    offset, width = rng.choice(_ZIP[signature])
    at = rng.choice(places) + offset
    return data[:at] + (number(rng) % 256**width).to_bytes(width, "little") + data[at + width :]


# Where a tar's header has its fields: offset and width.
_TAR = (
    *((0, 100), (100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (156, 1), (157, 100)),
    *((257, 8), (265, 32), (329, 8), (337, 8), (345, 155), (386, 12), (482, 1), (483, 12)),
)


def bend_tar(rng: Random, data: bytes) -> bytes:
    """Other bytes in a field of one of a tar's headers, its checksum made right again."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as opened:
            starts = [member.offset for member in opened.getmembers()]
    except (tarfile.TarError, ValueError, OverflowError, EOFError, IndexError):
        return data
    if not starts:
        return data
    at = rng.choice(starts)
    block = bytearray(data[at : at + 512].ljust(512, b"\0"))
    offset, width = rng.choice(_TAR)
    block[offset : offset + width] = _field(rng).ljust(width, b"\0")[:width]
    if rng.random() < 0.9:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return data[:at] + bytes(block) + data[at + 512 :]


def _field(rng: Random) -> bytes:
    return rng.choice(
        (
            lambda: b"%o" % max(0, number(rng)),
            lambda: b"\x80" + (number(rng) % 2**88).to_bytes(11, "big"),
            lambda: b"\xff" * 12,
            lambda: rng.choice(b"0123456789xgLKSVMND\0").to_bytes(1, "big"),
            lambda: rng.choice(_TOKENS),
            lambda: rng.choice(_TEXTS).encode("utf-8", "surrogatepass"),
            lambda: rng.randbytes(12),
        )
    )()


INPUTS: dict[str, Callable[[Random, Path], Path]] = {
    each.__name__: each for each in (configs, headers, weights, archives)
}


# Judging -----------------------------------------------------------------------------------


def judged(taking: Place, path: Path) -> str:
    """`taken`, or the first code it was refused with. Whatever else comes out is a bug."""
    try:
        version = taking.take(path)
    except TooLarge as error:
        return error.code
    except InvalidAdapter as error:
        json.dumps([str(error), *(p.as_dict() for p in error.problems)], allow_nan=False).encode()
        return error.problems[0].code
    json.dumps([version.checks, version.algebra], allow_nan=False).encode()
    assert_readable(taking.store.path(version.digest), version.digest)
    form = taking.ingest.form(version.digest)
    spec = peft.read(form)
    assert validate.scan(form, spec) == [] and spec.unknown == ()
    return "taken"


def assert_readable(folder: Path, expected: str) -> None:
    assert digest(folder) == expected
    with safe_open(folder / WEIGHTS, framework="np") as opened:
        assert sorted(opened.keys()) == sorted(peft.read(folder).weights.tensors)


def most_resident() -> int:
    """Bytes of memory this process has had since `forget_most`."""
    (line,) = (x for x in Path("/proc/self/status").read_text().split("\n") if "VmHWM" in x)
    return int(line.split()[1]) * 1024


def forget_most() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return most_resident()


def one(taking: Place, kind: str, number: int) -> str:
    """Makes an input and has it judged; AssertionError if anything about that is wrong."""
    with TemporaryDirectory(dir=taking.root) as folder:
        path = INPUTS[kind](Random(f"{SEED} {kind} {number}"), Path(folder))
        memory, started = forget_most(), time.thread_time()
        found = judged(taking, path)
        seconds, more = time.thread_time() - started, most_resident() - memory
        assert seconds < _MOST_S, f"it took {seconds:.1f} s"
        assert more < _MOST_BYTES, f"it took {more / 2**20:.0f} MiB"
        taking.clear()
        assert taking.remains() == []
        assert os.listdir(folder) == [path.name]
    return found


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is such a thing: a disk would take most of the time."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:Possible nested set")
@pytest.mark.parametrize("kind", INPUTS)
def test_everything_is_taken_or_refused(root: Path, kind: str):
    found: Counter[str] = Counter()
    with place(root) as taking:
        end, number = time.monotonic() + SECONDS / len(INPUTS), FIRST
        while time.monotonic() < end or number == FIRST:
            try:
                found[one(taking, kind, number)] += 1
            except Exception as error:
                pytest.fail(f"FUZZ_SEED={SEED} FUZZ_FIRST={number}, {kind}: {error!r}")
            number += 1
    print(f"FUZZ_SEED={SEED}, {kind}: {number - FIRST} inputs, {dict(found.most_common())}")
    assert SECONDS < 10 or {"taken"} < found.keys()
