from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import peft
from adapters.errors import InvalidAdapter
from adapters.spectrum import Spectrum, spectra, spectrum


def explicit(a: np.ndarray, b: np.ndarray, scaling: float) -> np.ndarray:
    """The singular values of ΔW, formed in double precision."""
    return np.linalg.svd(abs(scaling) * b.astype("f8") @ a.astype("f8"), compute_uv=False)


def holds(found: Spectrum, expected: np.ndarray) -> None:
    """Every share of the energy, and the norm, are those of `expected`."""
    values = np.zeros_like(expected)
    values[: len(found.values)] = found.values
    scale = expected[0] or 1.0
    np.testing.assert_allclose((values / scale) ** 2, (expected / scale) ** 2, atol=1e-9)
    assert np.all(np.diff(found.values) <= 0) and np.all(found.values >= 0)


@st.composite
def factors(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float]:
    """A and B of any rank up to more than the sizes, some of them with fewer directions."""
    r, d_in, d_out = (draw(st.integers(1, 12)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    a, b = rng.standard_normal((r, d_in)), rng.standard_normal((d_out, r))
    kind = draw(st.sampled_from(["full", "decaying", "doubled", "sparse", "ones"]))
    if kind == "decaying":
        b *= 10.0 ** -np.arange(r)
    elif kind == "doubled":
        a[r // 2 :] = a[: r - r // 2]
    elif kind == "sparse":
        a *= rng.random((r, 1)) < 0.5
        b *= rng.random((1, r)) < 0.5
    elif kind == "ones":
        a, b = np.ones_like(a), np.ones_like(b)
    sizes = 10.0 ** draw(st.integers(-30, 30)), 10.0 ** draw(st.integers(-30, 30))
    scaling = draw(st.sampled_from([2.0, 1.0, 0.01, -3.0, 0.0]))
    return (a * sizes[0]).astype("f4"), (b * sizes[1]).astype("f4"), scaling


@settings(max_examples=500, deadline=None)
@given(factors())
def test_it_is_what_svd_finds_in_delta_w(given_factors):
    a, b, scaling = given_factors
    found, expected = spectrum(a, b, scaling), explicit(a, b, scaling)
    assert found.values.dtype == np.float64
    assert len(found.values) == min(*a.shape, *b.shape)
    holds(found, expected)
    assert found.norm == pytest.approx(np.linalg.norm(expected), rel=1e-9)
    assert (found.norm == 0.0) == (not np.any(expected))


@settings(max_examples=200, deadline=None)
@given(factors(), st.floats(0, 1))
def test_energy_grows_to_one_and_ranks_keep_their_share(given_factors, share):
    found = spectrum(*given_factors)
    energies = [found.energy(k) for k in range(len(found.values) + 2)]
    assert energies == sorted(energies)
    assert energies[-1] == energies[-2] == 1.0
    assert energies[1:-1] == found.energies.tolist()
    k = found.rank_for(share)
    assert found.energy(k) >= share
    assert k == 0 or found.energy(k - 1) < share


def test_a_known_spectrum():
    found = spectrum(np.eye(3, dtype="f4"), np.diag([3, 0, 4]).astype("f4"), -2.0)
    np.testing.assert_allclose(found.values, [8, 6, 0])
    assert found.norm == pytest.approx(10)
    assert [found.energy(k) for k in range(4)] == pytest.approx([0, 0.64, 1, 1])
    assert [found.rank_for(s) for s in (0, 0.5, 0.64 - 1e-9, 0.65, 1)] == [0, 1, 1, 2, 2]


def test_shares_of_a_millionth():
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.standard_normal((300, 32)))[0]
    right = np.linalg.qr(rng.standard_normal((200, 32)))[0]
    energy = np.concatenate([np.ones(16), np.full(16, 1e-6)])
    found = spectrum(right.T.astype("f4"), (left * np.sqrt(energy)).astype("f4"), 1.0)
    np.testing.assert_allclose(np.square(found.values), energy, rtol=1e-4)
    assert found.energy(16) == pytest.approx(16 / energy.sum(), abs=1e-9)


@pytest.mark.parametrize("zero", ["a", "b", "both", "scaling", "apart"])
def test_no_change_has_a_norm_of_exactly_zero(zero):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4, 30)).astype("f4")
    b = rng.standard_normal((20, 4)).astype("f4")
    if zero in ("a", "both"):
        a[:] = 0
    if zero in ("b", "both"):
        b[:] = 0
    if zero == "apart":  # each direction lacks one of its halves
        a[:2], b[:, 2:] = 0, 0
    found = spectrum(a, b, 0.0 if zero == "scaling" else 2.0)
    assert found.norm == 0.0 and found.rank_for(0.99) == 0 and found.energy(1) == 1.0


def test_directions_that_cancel_are_no_change():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((8, 700)).astype("f4")
    b = rng.standard_normal((500, 8)).astype("f4")
    nothing = spectrum(np.concatenate([a, a]), np.concatenate([b, -b], axis=1), 1.0)
    assert nothing.norm == 0.0


@pytest.mark.parametrize("change", [1e-1, 1e-3, 1e-5, 1e-6])
def test_a_small_difference_of_large_products(change):
    """As in an adapter that began as PiSSA and was made plain LoRA of twice the rank."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((8, 70)).astype("f4")
    b = rng.standard_normal((50, 8)).astype("f4")
    moved = (b * (1 + change * np.arange(8))).astype("f4")
    a, b = np.concatenate([a, a]), np.concatenate([moved, -b], axis=1)
    holds(spectrum(a, b, 1.0), explicit(a, b, 1.0))


@pytest.mark.parametrize(
    ("size_a", "size_b"),
    [(1e30, 1e30), (3e38, 3e38), (1e-30, 1e-30), (1e-45, 1e-45), (1e30, 1e-30), (1e-45, 3e38)],
)
def test_extreme_sizes_neither_overflow_nor_vanish(size_a, size_b):
    a, b = np.full((4, 60), size_a, "f4"), np.full((50, 4), size_b, "f4")
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        found = spectrum(a, b, 2.0)
    expected = 2 * 4 * float(a[0, 0]) * float(b[0, 0]) * np.sqrt(60 * 50)
    assert found.norm == pytest.approx(expected, rel=1e-9)
    assert found.rank_for(0.99) == 1


def test_sizes_that_differ_within_a_factor():
    a, b = np.diag([1e30, 1e-30]).astype("f4"), np.diag([1e-30, 1e30]).astype("f4")
    np.testing.assert_allclose(spectrum(a, b, 1.0).values, [1, 1], rtol=1e-6)


def test_memory_is_that_of_the_factors():
    a, b = np.ones((8, 20_000), "f4"), np.ones((20_000, 8), "f4")
    tracemalloc.start()
    try:
        spectrum(a, b, 1.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * (a.nbytes + b.nbytes) < 20_000 * 20_000 * 4 / 100


def test_joined_keeps_the_first_directions_of_each():
    one, other = Spectrum(np.array([3.0, 1.0])), Spectrum(np.array([4.0, 2.0, 2.0]))
    joined = Spectrum.joined([one, other])
    np.testing.assert_allclose(np.square(joined.values), [25, 5, 4])
    assert joined.norm == pytest.approx(np.hypot(one.norm, other.norm))
    assert Spectrum.joined([]).norm == 0.0 and Spectrum.joined([]).rank_for(0.99) == 0


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_reads_every_pair_of_a_folder(make, tmp_path, dtype):
    made = make(rank=4, dtype=dtype, alpha_pattern={"v_proj": 2})
    del made.tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    spec = peft.read(made.write(tmp_path))
    found = spectra(tmp_path, spec)
    assert set(found) == {m for m, pair in spec.modules.items() if len(pair.tensors) == 2}
    for module, seen in found.items():
        a, b = (
            made.tensors[f"base_model.model.{module}.lora_{part}.weight"][1] for part in ("A", "B")
        )
        if dtype == "BF16":
            a, b = ((x.astype("<u4") << 16).view("<f4") for x in (a, b))
        holds(seen, explicit(a, b, 0.5 if "v_proj" in module else 2.0))


def test_a_file_that_became_shorter_is_refused(make, tmp_path):
    folder = make().write(tmp_path)
    spec = peft.read(folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InvalidAdapter) as error:
        spectra(folder, spec)
    assert [p.code for p in error.value.problems] == ["weights_truncated"]


def test_values_are_plain_numbers_for_json():
    found = spectrum(np.ones((2, 3), "f4"), np.ones((3, 2), "f4"), 1.0)
    assert json.dumps([found.norm, found.energy(1), found.rank_for(0.5)])
