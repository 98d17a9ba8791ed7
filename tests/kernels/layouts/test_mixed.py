import pytest
import torch

from kernels.errors import InputError
from kernels.layouts import MixedWeight
from kernels.layouts.mixed import column_grids


def packed(rows=5, columns=72, group_size=32, widths=(1, 3, 2), scale_dtype=torch.float16, seed=0):
    """A weight with codes of every value, and the codes, scales, zeros and means that went in."""
    generator = torch.Generator().manual_seed(seed)
    per_column = len(widths) == columns
    of_column = torch.tensor(widths if per_column else [widths[j // group_size] for j in range(columns)])
    _, of_grid = column_grids(of_column, group_size)
    codes = (torch.rand(rows, columns, generator=generator) * (1 << of_column)).long()
    scales = (0.1 + torch.rand(rows, len(of_grid), generator=generator)).to(scale_dtype)
    zeros = (torch.rand(rows, len(of_grid), generator=generator) * (1 << of_grid)).long()
    means = torch.randn(rows, len(of_grid), generator=generator).to(scale_dtype)
    weight = MixedWeight.pack(codes, scales, zeros, means, widths=widths, group_size=group_size)
    return weight, codes, scales, zeros, means, of_column


PER_COLUMN = tuple([1, 4, 2, 1, 8, 3] * 12)
both = pytest.mark.parametrize(
    "widths", [(1, 3, 2), (2, 2, 2), (1, 1, 1), PER_COLUMN], ids=["mixed", "2", "1", "column"]
)


@both
def test_decode_is_the_formula(widths):
    weight, codes, scales, zeros, means, of_column = packed(widths=widths)
    decoded = weight.decode()
    grid, _ = column_grids(of_column, 32)
    for i in range(5):
        for j in range(72):
            q, scale = grid[j], scales[i, grid[j]].float()
            if of_column[j] == 1:
                expected = means[i, q].float() + (scale if codes[i, j] else -scale)
            else:
                expected = (codes[i, j] - zeros[i, q]).float() * scale
            assert decoded[i, j] == expected


@both
def test_tensors_and_metadata_rebuild_the_weight(widths):
    weight = packed(widths=widths)[0]
    again = MixedWeight.from_tensors(weight.tensors(), weight.metadata())
    assert torch.equal(again.decode(), weight.decode())
    assert again.column_widths().tolist() == weight.column_widths().tolist()
    assert torch.equal(again.codes(), weight.codes())


def test_grids_are_numbered_by_group_then_by_width():
    grid, of_grid = column_grids(torch.tensor([2, 1, 2, 4, 4, 1]), 4)
    assert grid.tolist() == [1, 0, 1, 2, 4, 3]
    assert of_grid.tolist() == [1, 2, 4, 1, 4]


def test_one_bit_costs_one_bit():
    weight = packed(rows=64, columns=128, group_size=32, widths=(1, 2, 2, 3))[0]
    roles = weight.bytes_by_role()
    assert roles["code"] == 64 * 32 * (1 + 2 + 2 + 3) // 8
    assert roles["zero"] == 64 * (2 * 2 + 3) // 8  # of the three groups that have one
    assert roles["scale"] == 2 * (4 * 64 + 64)  # and a mean for the one-bit group
    assert roles["tag"] == 2  # four widths of three bits


def test_a_width_for_each_column_is_counted():
    weight = packed(rows=64, columns=72, widths=PER_COLUMN)[0]
    assert weight.bytes_by_role()["tag"] == 72 * 3 // 8
    assert weight.bytes_by_role()["code"] == sum(64 * 12 * width // 8 for width in (1, 4, 2, 1, 8, 3))
    assert weight.per_column


def test_a_group_of_one_column_has_one_width_either_way():
    weight, codes, *_ = packed(columns=6, group_size=1, widths=(1, 2, 3, 1, 2, 8))
    assert not weight.per_column
    assert torch.equal(weight.codes().long(), codes)


@pytest.mark.parametrize("widths", [(1, 2), (1,) * 71, ()])
def test_a_wrong_number_of_widths_is_refused(widths):
    with pytest.raises(InputError, match="widths for 72 columns in 3 groups of 32"):
        codes = torch.zeros(5, 72, dtype=torch.uint8)
        MixedWeight.pack(codes, torch.ones(5, 3), codes[:, :3], torch.ones(5, 3), widths=widths, group_size=32)


@pytest.mark.parametrize("name", ["codes_b1", "zeros_b3", "scales", "means", "bits"])
def test_missing_short_and_unknown_tensors_are_refused(name):
    weight = packed()[0]
    tensors = weight.tensors()
    for damaged in (
        {key: tensor for key, tensor in tensors.items() if key != name},
        {**tensors, name: tensors[name].reshape(-1)[:-1]},
        {**tensors, "extra": torch.zeros(1)},
    ):
        with pytest.raises(InputError):
            MixedWeight.from_tensors(damaged, weight.metadata())


@pytest.mark.parametrize("change", [{"group_size": 0}, {"group_size": 73}, {"per_column": 1}, {"shape": [5, 0]}])
def test_damaged_metadata_is_refused(change):
    weight = packed()[0]
    with pytest.raises(InputError):
        MixedWeight.from_tensors(weight.tensors(), {**weight.metadata(), **change})
