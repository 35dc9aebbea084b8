"""The CPU op against ΔW·x written out row by row in fp64."""

import pytest
import torch

from server.engine.cpu_lora import expand, group_rows, shrink

SLOTS, RANK, D_IN, D_OUT = 3, 8, 48, 40


@pytest.mark.parametrize(
    "rows",
    [
        [-1, -1, -1],
        [0],
        [2, 2, 2, 2],
        [-1, 0, 0, 1, 1, 2],
        [2, -1, 0, 2, -1, 1, 0, 0, -1],
        [0, 1] * 20 + [-1],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_gets_its_own_adapter_and_base_rows_none(
    rows: list[int], dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(len(rows))
    a = torch.randn(SLOTS, 1, RANK, D_IN, generator=random).to(dtype)
    b = torch.randn(SLOTS, 1, D_OUT, RANK, generator=random).to(dtype)
    x = torch.randn(len(rows), D_IN, generator=random).to(dtype)
    y = torch.randn(len(rows), D_OUT, generator=random).to(dtype)
    want = y.double()
    for i, slot in enumerate(rows):
        if slot >= 0:
            want[i] += 0.5 * b[slot, 0].double() @ (a[slot, 0].double() @ x[i].double())

    groups = group_rows(torch.tensor(rows))
    got, h = y.clone(), torch.full((len(rows), RANK), torch.nan)
    shrink(h, x, a, groups, 0.5)
    expand(got, h, b, groups)

    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-4)
    for i, slot in enumerate(rows):
        if slot < 0:
            assert torch.equal(got[i], y[i])
            assert h[i].isnan().all()


def test_groups_are_views_where_rows_are_neighbours() -> None:
    groups = dict(group_rows(torch.tensor([1, 1, 0, 2, 0, -1])))
    assert groups[1] == slice(0, 2)
    assert groups[2] == slice(3, 4)
    assert torch.equal(groups[0], torch.tensor([2, 4]))  # type: ignore[arg-type]


def test_a_padded_output_keeps_its_padding() -> None:
    y = torch.zeros(2, D_OUT + 5)
    expand(y, torch.ones(2, RANK), torch.ones(SLOTS, 1, D_OUT, RANK), [(0, slice(0, 2))])
    assert (y[:, :D_OUT] == RANK).all()
    assert (y[:, D_OUT:] == 0).all()
