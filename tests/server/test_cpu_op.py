"""The CPU LoRA op, both forms, against ΔW·x written out in fp64."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from server.engine.cpu import build, op
from server.engine.cpu.punica import group_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Largest relative error of one rounding; the op rounds its fp32 sum once, into y.
ROUNDING = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}
CANARY = 7.0


@pytest.fixture
def compiled() -> op.Op:
    if not build.library().exists():
        build.build()
    installed = op.install()
    assert op.form() != "torch"
    return installed


@pytest.fixture(params=["torch", *build.INSTRUCTION_SETS])
def form(request: pytest.FixtureRequest, compiled: op.Op) -> Iterator[op.Op]:
    """The form in torch, and the compiled one at each instruction set that this machine has."""
    if request.param == "torch":
        yield op.Reference()
        return
    if request.param not in op.instruction_sets():
        pytest.skip(f"this machine has no {request.param}")
    torch.ops.loraplex.use_instruction_set(request.param)
    yield compiled
    torch.ops.loraplex.use_instruction_set(op.form())


@dataclass
class Layer:
    """A layer with an adapter in each slot: rank by slot and slice, widths by slice."""

    form: op.Op
    ranks: list[list[int]]
    d_in: int
    widths: list[int]
    dtype: torch.dtype
    seed: int = 0
    a: list[list[torch.Tensor]] = field(default_factory=list)
    b: list[list[torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        self.batch = self.form.new_batch()
        self.number = self.form.new_layer(len(self.ranks), self.batch)
        starts = [sum(self.widths[:i]) for i in range(len(self.widths))]
        for slot, ranks in enumerate(self.ranks):
            a = [torch.randn(r, self.d_in, generator=random) * self.d_in**-0.5 for r in ranks]
            b = [
                torch.randn(r, w, generator=random) * max(r, 1) ** -0.5
                for r, w in zip(ranks, self.widths, strict=True)
            ]
            self.a.append([each.to(self.dtype) for each in a])
            self.b.append([each.to(self.dtype) for each in b])
            packed = self.form.pack(self.a[-1], self.b[-1], starts)
            self.form.set_slot(self.number, slot, packed)
            self.form.free([packed])

    def input(self, rows: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(self.seed + rows)
        return torch.randn(rows, self.d_in, generator=random).to(self.dtype)

    def output(self, rows: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(self.seed - rows)
        return torch.randn(rows, sum(self.widths), generator=random).to(self.dtype)

    def apply(self, y: torch.Tensor, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
        self.form.set_rows(self.batch, *group_rows(torch.tensor(slots, dtype=torch.long)))
        self.form.add_lora(y, x, self.number)
        return y

    def expected(self, y: torch.Tensor, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
        y, x = y.double(), x.double()
        for row, slot in enumerate(slots):
            if slot >= 0:
                delta = [
                    x[row] @ a.double().T @ b.double()
                    for a, b in zip(self.a[slot], self.b[slot], strict=True)
                ]
                y[row] += torch.cat(delta)
        return y

    def check(self, slots: list[int]) -> None:
        x, y = self.input(len(slots)), self.output(len(slots))
        want = self.expected(y, x, slots)
        got = self.apply(y.clone(), x, slots)
        close(got, want, self.dtype)
        base = [row for row, slot in enumerate(slots) if slot < 0]
        assert torch.equal(got[base], y[base])


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    rounding = ROUNDING[dtype]
    # An absolute part for sums that cancel: fp32's own error over the longest sum.
    torch.testing.assert_close(got.double(), want, rtol=rounding, atol=2e-5 + 2**-6 * rounding)


def slots_of(rows: int, slots: int, seed: int) -> list[int]:
    """A slot or -1 for each row, at random."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-1, slots, (rows,), generator=random).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 31, 32, 33, 100, 512])
def test_every_number_of_rows(form: op.Op, rows: int, dtype: torch.dtype) -> None:
    Layer(form, [[8], [8], [8]], 576, [192], dtype).check(slots_of(rows, 3, rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7, 8, 16, 33, 64, 128, 256])
def test_every_rank(form: op.Op, rank: int, dtype: torch.dtype) -> None:
    layer = Layer(form, [[rank], [rank]], 96, [160], dtype)
    for rows in (1, 6, 40):
        layer.check(slots_of(rows, 2, rank))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_in", [1, 7, 16, 31, 33, 64, 100])
@pytest.mark.parametrize("width", [1, 5, 16, 33, 65, 130])
def test_widths_that_no_vector_divides(
    form: op.Op, d_in: int, width: int, dtype: torch.dtype
) -> None:
    Layer(form, [[3], [5]], d_in, [width], dtype).check([0, 1, -1, 0, 0, 0, 0, 1])


@pytest.mark.parametrize("adapters", [1, 2, 16, 64])
def test_many_adapters_of_different_ranks(form: op.Op, adapters: int) -> None:
    ranks = [[(1, 4, 8, 16, 64)[i % 5]] for i in range(adapters)]
    layer = Layer(form, ranks, 128, [96], torch.bfloat16)
    for rows in (adapters, 3 * adapters):
        layer.check([i % adapters for i in range(rows)])
        layer.check(slots_of(rows, adapters, rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 9, 70])
def test_fused_layers_with_slices_of_their_own_rank(
    form: op.Op, rows: int, dtype: torch.dtype
) -> None:
    ranks = [[8, 8, 8], [4, 0, 16], [0, 0, 0], [0, 2, 0]]
    Layer(form, ranks, 64, [64, 24, 24], dtype).check(slots_of(rows, 4, rows))


def test_no_adapter_in_the_batch_changes_nothing(form: op.Op) -> None:
    layer = Layer(form, [[8]], 32, [32], torch.bfloat16)
    y = layer.output(4)
    assert torch.equal(layer.apply(y.clone(), layer.input(4), [-1] * 4), y)
    assert torch.equal(layer.apply(y[:0].clone(), layer.input(4)[:0], []), y[:0])


def test_base_rows_are_not_even_read(form: op.Op) -> None:
    layer = Layer(form, [[8], [64]], 64, [64], torch.bfloat16)
    slots = [-1, 0, -1, 1, 1, -1]
    x, y = layer.input(6), layer.output(6)
    base = [0, 2, 5]
    want = layer.expected(y, x, slots)
    x[base], y[base] = torch.nan, torch.nan
    got = layer.apply(y, x, slots)
    assert got[base].isnan().all()
    close(got[[1, 3, 4]], want[[1, 3, 4]], torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_beside_y(form: op.Op, dtype: torch.dtype) -> None:
    layer = Layer(form, [[8, 8]], 40, [33, 19], dtype)
    for rows in (3, 40):
        around = torch.full((rows + 2, 52 + 6), CANARY, dtype=dtype)
        y = around[1:-1, 3:-3]
        y.copy_(layer.output(rows))
        x, want = layer.input(rows), layer.expected(y, layer.input(rows), [0] * rows)
        layer.apply(y, x, [0] * rows)
        close(y, want, dtype)
        y.fill_(CANARY)
        assert (around == CANARY).all()


@pytest.mark.parametrize("rows", [4, 40])
def test_any_strides(form: op.Op, rows: int) -> None:
    layer = Layer(form, [[8]], 48, [64], torch.bfloat16)
    slots = slots_of(rows, 1, rows)
    x, y = layer.input(rows), layer.output(rows)
    want = layer.expected(y, x, slots)
    wide = torch.full((rows, 3 * 48), torch.nan, dtype=x.dtype)
    wide[:, 48:96] = x
    tall = torch.full((rows * 2, 48), torch.nan, dtype=x.dtype)
    tall[::2] = x
    for each in (wide[:, 48:96], tall[::2], x.T.contiguous().T):
        close(layer.apply(y.clone(), each, slots), want, torch.bfloat16)
    columns = y.T.contiguous().T
    close(layer.apply(columns, x, slots), want, torch.bfloat16)


@pytest.mark.parametrize("form", build.INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_bits_in_every_batch(form: op.Op, dtype: torch.dtype) -> None:
    layer = Layer(form, [[8], [64], [16]], 100, [90], dtype)
    x, y = layer.input(70), layer.output(70)
    slots = slots_of(70, 3, 5)
    together = layer.apply(y.clone(), x, slots)
    for row, slot in enumerate(slots):
        alone = layer.apply(y[row : row + 1].clone(), x[row : row + 1], [slot])
        assert torch.equal(alone[0], together[row])
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    shuffled = layer.apply(y[order], x[order], [slots[i] for i in order])
    assert torch.equal(shuffled, together[order])


def test_a_slot_can_be_filled_anew(form: op.Op) -> None:
    layer = Layer(form, [[8]], 32, [32], torch.float32)
    layer.check([0, 0, -1])
    layer.a[0] = [torch.ones(2, 32)]
    layer.b[0] = [torch.ones(2, 32)]
    form.set_slot(layer.number, 0, form.pack(layer.a[0], layer.b[0], [0]))
    layer.check([0, -1, 0])
    y = layer.output(2)
    for nothing in (form.pack([torch.empty(0, 32)], [torch.empty(0, 32)], [0]), 0):
        form.set_slot(layer.number, 0, nothing)
        assert torch.equal(layer.apply(y.clone(), layer.input(2), [0, 0]), y)


def test_packed_once_and_shared_by_slots(form: op.Op) -> None:
    layer = Layer(form, [[8], [8]], 64, [96], torch.bfloat16)
    before = form.packed_bytes()
    packed = form.pack(layer.a[0], layer.b[0], [0])
    assert form.packed_bytes() - before == 2 * 8 * (64 + 96)
    form.set_slot(layer.number, 1, packed)
    layer.a[1], layer.b[1] = layer.a[0], layer.b[0]
    layer.check([0, 1, -1, 1])
    assert form.packed_bytes() - before == 2 * 8 * (64 + 96)
    form.free([packed, packed, 2**40])
    assert form.packed_bytes() == before
    layer.check([1, 0, -1, 1])
    with pytest.raises((IndexError, KeyError, RuntimeError)):
        form.set_slot(layer.number, 0, packed)
    layer.check([0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_takes_any_strides_and_keeps_nothing(form: op.Op, dtype: torch.dtype) -> None:
    layer = Layer(form, [[5, 3]], 33, [70, 6], dtype)
    wide = [torch.cat([torch.full_like(a, torch.nan), a], 1) for a in layer.a[0]]
    tall = [b.T.contiguous() for b in layer.b[0]]
    packed = form.pack([a[:, 33:] for a in wide], [b.T for b in tall], [0, 70])
    form.set_slot(layer.number, 0, packed)
    for each in (*wide, *tall):
        each.fill_(torch.nan)
    layer.check([0, -1, 0])


def test_packing_beside_a_running_step(form: op.Op) -> None:
    layer = Layer(form, [[8], [64]], 128, [256], torch.bfloat16)
    slots = slots_of(20, 2, 3)
    want = layer.apply(layer.output(20), layer.input(20), slots)
    stop = threading.Event()
    counts: list[int] = []

    def pack() -> None:
        count = 0
        while not stop.is_set():
            form.free([form.pack(layer.a[1], layer.b[1], [0])])
            count += 1
        counts.append(count)

    threads = [threading.Thread(target=pack) for _ in range(2)]
    before = form.packed_bytes()
    for thread in threads:
        thread.start()
    for _ in range(200):
        assert torch.equal(layer.apply(layer.output(20), layer.input(20), slots), want)
    stop.set()
    for thread in threads:
        thread.join()
    assert min(counts) > 0
    assert form.packed_bytes() == before


@pytest.mark.parametrize(
    ("a", "b", "outputs", "says"),
    [
        ([torch.ones(2, 8)], [torch.ones(3, 8)], [0], "do not fit"),
        ([torch.ones(2, 8), torch.ones(2, 9)], [torch.ones(2, 8)] * 2, [0, 8], "do not fit"),
        ([torch.ones(2, 8)], [torch.ones(2, 8).bfloat16()], [0], "different types"),
        ([torch.ones(2, 8)], [torch.ones(2, 8)], [], "first output"),
        ([], [], [], "first output"),
        ([torch.ones(2, 8).double()], [torch.ones(2, 8).double()], [0], "not in"),
    ],
)
def test_what_does_not_fit_is_not_packed(
    compiled: op.Op, a: list[Any], b: list[Any], outputs: list[int], says: str
) -> None:
    with pytest.raises(RuntimeError, match=says):
        compiled.pack(a, b, outputs)


def test_infinities_and_nans_stay_in_their_row(form: op.Op) -> None:
    layer = Layer(form, [[8]], 64, [64], torch.bfloat16)
    x, y = layer.input(5), layer.output(5)
    want = layer.expected(y, x, [0] * 5)
    x[2, 3], y[4, 1] = torch.nan, torch.inf
    got = layer.apply(y, x, [0] * 5)
    assert got[2].isnan().all()
    assert got[4, 1].isinf()
    close(got[[0, 1, 3]], want[[0, 1, 3]], torch.bfloat16)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 2, 8, 64])
def test_threads_do_not_change_a_bit(compiled: op.Op, rows: int, threads: None) -> None:
    layer = Layer(compiled, [[64, 64, 64], [8, 8, 8]], 576, [576, 192, 192], torch.bfloat16)
    slots = slots_of(rows, 2, rows)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(layer.apply(layer.output(rows), layer.input(rows), slots))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_rows_that_the_step_does_not_have_are_refused(compiled: op.Op) -> None:
    layer = Layer(compiled, [[8]], 32, [32], torch.float32)
    layer.apply(layer.output(4), layer.input(4), [-1, -1, -1, 0])
    with pytest.raises(RuntimeError, match="4 rows"):
        compiled.add_lora(layer.output(2), layer.input(2), layer.number)


def test_an_output_too_narrow_or_of_another_type_is_refused(compiled: op.Op) -> None:
    layer = Layer(compiled, [[8]], 32, [32], torch.bfloat16)
    x, y = layer.input(2), layer.output(2)
    for wrong in (y[:, :31], y.float()):
        with pytest.raises(RuntimeError, match="32 inputs and 32 outputs in BFloat16"):
            layer.apply(wrong, x, [0, -1])
    assert torch.equal(layer.apply(y.float(), x, [-1, -1]), y.float())


def test_one_column_wide_in_a_stride_of_its_own(form: op.Op) -> None:
    layer = Layer(form, [[2]], 1, [1], torch.float32)
    x, y = layer.input(3), layer.output(3)
    want = layer.expected(y, x, [0, -1, 0])
    odd = torch.empty_strided((3, 1), (1, 3)).copy_(x)
    close(layer.apply(torch.empty_strided((3, 1), (1, 3)).copy_(y), odd, [0, -1, 0]), want, x.dtype)


def test_torch_compile_sees_one_call_that_changes_y(compiled: op.Op) -> None:
    layer = Layer(compiled, [[8], [8]], 64, [64], torch.float32)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(9))

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x @ weight
        torch.ops.loraplex.add_lora(y, x, layer.number)
        return torch.relu(y) + 1

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 7):
        slots = slots_of(rows, 2, rows)
        x = layer.input(rows)
        layer.apply(torch.zeros(rows, 64), x, slots)
        assert torch.equal(compiled(x), forward(x))
        assert not torch.equal(compiled(x), torch.relu(x @ weight) + 1)


@pytest.mark.parametrize(
    ("slots", "groups"),
    [
        ([], ([], [], [])),
        ([-1, -1], ([], [], [])),
        ([2], ([0], [2], [1])),
        ([1, -1, 0, 1], ([2, 0, 3], [0, 1], [1, 2])),
    ],
)
def test_groups(slots: list[int], groups: tuple[list[int], list[int], list[int]]) -> None:
    rows, used, counts = group_rows(torch.tensor(slots, dtype=torch.long))
    assert (rows.tolist(), used, counts) == groups
