from __future__ import annotations

import io
import os
import stat
import tarfile
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.errors import AdapterError, InvalidAdapter, TooLarge
from adapters.sources.archive import unpack
from adapters.store import digest
from tests.adapters.corpus import KINDS, compressed, pack

BOTH = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}


@pytest.fixture
def open_archive(tmp_path):
    def run(content: bytes, max_bytes: int = 10**6, **limits: int) -> dict[str, bytes]:
        (tmp_path / "archive").write_bytes(content)
        into = tmp_path / "into"
        into.mkdir()
        unpack(tmp_path / "archive", into, max_bytes, **limits)
        assert not any(p.is_dir() for p in into.iterdir())
        return {p.name: p.read_bytes() for p in into.iterdir()}

    return run


def code(run, *arguments, **limits) -> list[str]:
    with pytest.raises(InvalidAdapter) as refused:
        run(*arguments, **limits)
    return [p.code for p in refused.value.problems]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "./", "sql/", "./a/b/"])
def test_the_adapter_is_found_and_the_rest_skipped(open_archive, kind, prefix):
    entries = [(prefix + n, c) for n, c in BOTH.items()]
    entries[1:1] = [
        (prefix + "README.md", b"hello"),
        (prefix + "training_args.bin", b"pickle"),
        ("other/notes.txt", b"x"),
        ("__MACOSX/._adapter_config.json", b"x"),
    ]
    assert open_archive(pack(kind, entries)) == BOTH


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_does_not_depend_on_the_kind(open_archive, make, tmp_path, kind):
    folder = make().write(tmp_path / "made")
    entries = [(f"x/{n}", (folder / n).read_bytes()) for n in sorted(os.listdir(folder))[::-1]]
    open_archive(pack(kind, entries))
    assert digest(tmp_path / "into") == digest(folder)


def test_archives_made_by_tools(open_archive, make, tmp_path):
    import shutil

    made = make().write(tmp_path / "made" / "sql").parent
    for kind in ("zip", "gztar", "tar"):
        archive = Path(shutil.make_archive(str(tmp_path / kind), kind, made))
        assert set(open_archive(archive.read_bytes())) == set(BOTH)
        shutil.rmtree(tmp_path / "into")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    ["/etc/x", "../x", "a/../../x", "..", "a\\..\\x", "C:x", "/adapter_config.json"],
)
def test_paths_that_lead_out(open_archive, tmp_path, kind, name):
    assert code(open_archive, pack(kind, [(name, b"x"), *BOTH.items()])) == ["archive_path"]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicates_and_several_adapters(open_archive, kind, tmp_path):
    twice = [*BOTH.items(), ("./adapter_config.json", b"[]")]
    assert code(open_archive, pack(kind, twice)) == ["archive_duplicate"]
    (tmp_path / "into").rename(tmp_path / "first")
    two = [(f"{folder}/{n}", c) for folder in "ab" for n, c in BOTH.items()]
    assert code(open_archive, pack(kind, two)) == ["archive_several"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_in_a_tar(open_archive, tmp_path, kind):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo("adapter_config.json")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    assert code(open_archive, packed.getvalue()) == ["archive_special"]
    assert os.listdir(tmp_path / "into") == []


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_devices_in_a_zip(open_archive, kind):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        info = zipfile.ZipInfo("adapter_config.json")
        info.external_attr = (kind | 0o644) << 16
        archive.writestr(info, "/etc/passwd")
    assert code(open_archive, packed.getvalue()) == ["archive_special"]


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_are_named_when_there_is_nothing_else(open_archive, kind):
    only = [("a/adapter_config.json", b"{}"), ("a/adapter_model.bin", b"x"), ("b/c.pt", b"")]
    assert code(open_archive, pack(kind, only)) == ["pickle_refused"]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_find(open_archive, kind):
    assert code(open_archive, pack(kind, [("notes.txt", b"x")])) == [
        "config_missing",
        "weights_missing",
    ]


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"PK\x03\x04" + b"\0" * 99, b"\x1f\x8b", b"x" * 2000, b"\0" * 512],
)
def test_no_archive_at_all(open_archive, content):
    found = code(open_archive, content)
    assert found in (["archive_broken"], ["config_missing", "weights_missing"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_stops_at_the_limit(open_archive, tmp_path, kind):
    bomb = pack(kind, [("adapter_model.safetensors", b"\0" * 30_000_000)])
    with pytest.raises(TooLarge):
        open_archive(bomb, max_bytes=1_000_000)
    assert sum(p.stat().st_size for p in (tmp_path / "into").iterdir()) <= 1_000_000


@pytest.mark.parametrize("kind", ["tar.gz", "tar.zst"])
def test_a_bomb_in_a_skipped_file_stops_too(open_archive, kind):
    with pytest.raises(TooLarge):
        open_archive(pack(kind, [("README.md", b"\0" * 50_000_000)]), max_bytes=1_000_000)


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_entries(open_archive, kind):
    many = pack(kind, [(f"{n}.txt", b"") for n in range(20)])
    with pytest.raises(TooLarge, match="entries"):
        open_archive(many, max_entries=10)


@pytest.mark.parametrize("kind", ["tar.gz", "tar.zst"])
def test_a_tar_header_cannot_ask_for_memory(open_archive, kind):
    member = tarfile.TarInfo("pax")
    member.type, member.size = tarfile.XHDTYPE, 2**32
    tar = compressed(kind, member.tobuf(tarfile.USTAR_FORMAT) + b"\0" * 50_000_000)
    tracemalloc.start()
    try:
        assert code(open_archive, tar, max_bytes=2**40) == ["archive_broken"]
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_zip_table_of_contents_cannot_ask_for_memory(open_archive):
    names = [(f"{'n' * 200}{n}", b"") for n in range(8000)]
    assert code(open_archive, pack("zip", names)) == ["archive_broken"]


def test_zstd_in_several_frames_and_pieces(open_archive):
    tar = pack("tar", list(BOTH.items()))
    frames = [compressed("tar.zst", tar[at : at + 700]) for at in range(0, len(tar), 700)]
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0oops"
    assert open_archive(frames[0] + skipped + b"".join(frames[1:])) == BOTH


def test_zstd_cannot_ask_for_memory(open_archive, tmp_path):
    # A frame whose header says that all of its 2 GB must be remembered.
    window = bytes([(31 - 10) << 3])
    content = b"\x28\xb5\x2f\xfd" + b"\0" + window + b"\x01\0\0"
    assert code(open_archive, content) == ["archive_broken"]
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    largest = zstandard.ZstdCompressor(compression_params=parameters)
    (tmp_path / "into").rename(tmp_path / "first")
    assert open_archive(largest.compress(pack("tar", list(BOTH.items())))) == BOTH


@pytest.mark.parametrize("size", [-1, -512, -(2**40)])
def test_a_negative_size_in_a_tar(open_archive, size):
    member = tarfile.TarInfo("adapter_config.json")
    member.size = size
    tar = member.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024
    assert code(open_archive, tar) == ["archive_broken"]


def test_an_encrypted_or_oddly_compressed_zip(open_archive, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("adapter_config.json", b"{}")
    assert code(open_archive, packed.getvalue()) == ["archive_broken"]
    (tmp_path / "into").rename(tmp_path / "first")
    flagged = bytearray(pack("zip", list(BOTH.items())))
    flagged[flagged.index(b"PK\x01\x02") + 8] |= 1
    assert code(open_archive, bytes(flagged)) == ["archive_broken"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_archive(open_archive, kind, tmp_path):
    content = pack(
        kind, [("adapter_config.json", os.urandom(5000)), ("adapter_model.safetensors", b"x")]
    )
    assert code(open_archive, content[:3000]) == ["archive_broken"]


samples = {kind: pack(kind, [("a/" + n, c * 50) for n, c in BOTH.items()]) for kind in KINDS}


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(KINDS), st.booleans(), st.data())
def test_a_damaged_archive_is_unpacked_or_refused(kind, packed, data):
    content = bytearray(samples[kind if packed or kind == "zip" else "tar"])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    damaged = bytes(content) if packed else compressed(kind, bytes(content))
    with tempfile.TemporaryDirectory() as root:
        Path(root, "archive").write_bytes(damaged)
        into = Path(root, "into")
        into.mkdir()
        try:
            unpack(Path(root, "archive"), into, 100_000)
        except AdapterError as error:
            assert error.code in ("invalid_adapter", "too_large"), error
        assert set(os.listdir(into)) <= set(BOTH)
        assert sorted(os.listdir(root)) == ["archive", "into"]
