from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters import weights
from adapters.errors import InvalidAdapter


def codes(folder: Path) -> list[str]:
    try:
        weights.read(folder)
    except InvalidAdapter as error:
        return [p.code for p in error.problems]
    return []


def put(folder: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + data
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


def entry(begin: int, end: int, shape: object = None, dtype: str = "U8") -> dict:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_safetensors_wrote(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    arrays = {"b": np.ones((2, 3), "<f4"), "a": np.zeros((4,), "<f2"), "empty": np.ones((0, 5))}
    save_file(arrays, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    read = weights.read(tmp_path)
    assert list(read.tensors) == ["a", "b", "empty"]
    assert read.bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    b = read.tensors["b"]
    assert (b.dtype, b.shape, b.elements) == ("F32", (2, 3), 6)
    with (tmp_path / "adapter_model.safetensors").open("rb") as file:
        assert b"".join(weights.blocks(file, b)) == arrays["b"].tobytes()
        assert list(weights.blocks(file, read.tensors["empty"])) == []


@pytest.mark.parametrize(
    ("header", "data", "expected"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "header_offsets"),
        ({"a": entry(0, 4), "b": entry(5, 6)}, 6, "header_offsets"),
        ({"a": entry(1, 4)}, 4, "header_offsets"),
        ({"a": entry(0, 4)}, 5, "weights_trailing"),
        ({"a": entry(0, 4)}, 3, "weights_truncated"),
        ({"a": entry(0, 4, [3])}, 4, "header_shape"),
        ({"a": entry(0, 4, [2, 2], "F32")}, 4, "header_shape"),
        ({"a": entry(0, 4, [4], "F4")}, 4, "header_dtype"),
        ({"a": entry(4, 0, [0])}, 4, "header_entry"),
        ({"a": entry(0, 4, [-2, -2])}, 4, "header_entry"),
        ({"a": entry(0, 4, [True, 4])}, 4, "header_entry"),
        ({"a": entry(0, 0, [2**63, 0])}, 0, "header_entry"),
        ({"a": entry(0, 1, [1] * 40)}, 1, "header_entry"),
        ({"a": [0, 4]}, 4, "header_entry"),
        ({"a": {**entry(0, 4), "more": 1}}, 4, "header_entry"),
        ({"a" * 600: entry(0, 4)}, 4, "header_name"),
        ({"__metadata__": {"a": 1}}, 0, "header_metadata"),
        (b'{"a":1,"a":2}', 0, "header_json"),
        (b" {}", 0, "header_json"),
        (b"[]", 0, "header_json"),
        (b'{"a":NaN}', 0, "header_json"),
        (b"{" * 50_000, 0, "header_json"),
        (b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", 0, "header_json"),
        (b'{"a":' + b"9" * 5000 + b"}", 0, "header_json"),
        (b'{"a":1e999}', 0, "header_json"),
        (rb'{"a\ud800":1}', 0, "header_json"),
        (rb'{"a\u0000":1}', 0, "header_json"),
        (b'{"\xff":1}', 0, "header_json"),
    ],
)
def test_lying_headers(tmp_path, header, data, expected):
    assert codes(put(tmp_path, header, b"\0" * data)) == [expected]


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 8, b"\xff" * 400])
def test_files_that_are_hardly_there(tmp_path, content):
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    assert codes(tmp_path) in (["weights_truncated"], ["header_length"])


def test_a_huge_header_is_not_read(tmp_path):
    with (tmp_path / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**30 + 8)
    assert codes(tmp_path) == ["header_length"]


def test_all_kinds_of_faults_are_reported_at_once(tmp_path):
    header = {"a": entry(0, 4, [3]), "b": entry(4, 8, [4], "F4"), "c": 1, "d": entry(8, 12, [3])}
    assert codes(put(tmp_path, header, b"\0" * 12)) == [
        "header_shape",
        "header_dtype",
        "header_entry",
    ]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_a_plain_file_is_opened(tmp_path, kind):
    path = tmp_path / "adapter_model.safetensors"
    if kind == "link":
        put(tmp_path, {})
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert codes(tmp_path) == ["not_a_regular_file"]


def accepted_by_library(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, framework="np"):
            return True
    except safetensors.SafetensorError:
        return False


plausible = st.dictionaries(
    st.sampled_from(["a", "b", "c", "__metadata__"]),
    st.one_of(
        st.builds(
            lambda dtype, shape, begin, length: {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [begin, begin + length],
            },
            st.sampled_from(["U8", "F16", "F32", "F99"]),
            st.lists(st.integers(-1, 4), max_size=3),
            st.integers(0, 8),
            st.integers(-1, 16),
        ),
        st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
        st.integers(),
    ),
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(plausible | st.binary(max_size=60), st.integers(0, 24))
def test_what_is_accepted_the_library_accepts_too(header, data):
    with tempfile.TemporaryDirectory() as folder:
        found = codes(put(Path(folder), header, b"\0" * data))
        if not found:
            assert accepted_by_library(Path(folder) / "adapter_model.safetensors")


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_file_is_read_or_refused(make, data):
    content = bytearray(make().weights())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 200))
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"
        path.write_bytes(content)
        if not codes(Path(folder)):
            assert accepted_by_library(path)
