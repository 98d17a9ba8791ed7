import pytest
import torch

from kernels.errors import InputError
from kernels.layouts import ChannelCodebookWeight

WIDTHS = torch.tensor([2, 3, 1, 2, 4, 3, 2])


def parts(rows=33, outliers=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.rand(rows, len(WIDTHS), generator=generator) * (1 << WIDTHS)).to(torch.uint8)
    levels = torch.randn(int((1 << WIDTHS).sum()), generator=generator).half()
    weight = torch.randn(rows, len(WIDTHS), generator=generator).half()
    mask = torch.rand(rows, len(WIDTHS), generator=generator) < (0.1 if outliers else 0.0)
    mask[3] = False  # a row without any
    return codes, levels, weight, mask


def packed(**kwargs):
    codes, levels, weight, mask = parts(**kwargs)
    return ChannelCodebookWeight.pack(codes, levels, widths=WIDTHS, outliers=mask, weight=weight)


@pytest.mark.parametrize("outliers", [True, False])
def test_decode_looks_up_each_column_in_its_own_levels_and_keeps_outliers(outliers):
    codes, levels, weight, mask = parts(outliers=outliers)
    decoded = packed(outliers=outliers).decode()
    books = levels.float().split((1 << WIDTHS).tolist())
    for i in range(33):
        for j in range(len(WIDTHS)):
            expected = weight[i, j].float() if mask[i, j] else books[j][int(codes[i, j])]
            assert decoded[i, j] == expected


def test_outlier_positions_are_those_of_the_mask_in_row_major_order():
    mask = parts()[3]
    rows, columns = packed().outlier_positions()
    assert torch.equal(torch.stack([rows, columns], dim=1), mask.nonzero())


def test_every_byte_is_counted_by_role():
    weight, (_, levels, _, mask) = packed(), parts()
    count = int(mask.sum())
    roles = weight.bytes_by_role()
    assert roles["outlier"] == 2 * count
    assert roles["index"] == 2 * count + 4 * 34
    assert roles["codebook"] == 2 * levels.numel()
    assert roles["tag"] == -(-len(WIDTHS) * 3 // 8)
    assert roles["code"] == sum(-(-33 * int((w == WIDTHS).sum()) * w // 8) for w in (1, 2, 3, 4))


def test_without_outliers_nothing_is_stored_for_them():
    assert set(packed(outliers=False).bytes_by_role()) == {"code", "codebook", "tag"}


@pytest.mark.parametrize("outliers", [True, False])
def test_tensors_and_metadata_rebuild_the_weight(outliers):
    weight = packed(outliers=outliers)
    again = ChannelCodebookWeight.from_tensors(weight.tensors(), weight.metadata())
    assert torch.equal(again.decode(), weight.decode())


def test_outliers_outside_the_matrix_are_refused():
    weight = packed()
    tensors = weight.tensors()
    for name, value in (("outlier_columns", 7), ("outlier_columns", -1), ("outlier_rows", 5)):
        damaged = {**tensors, name: tensors[name].clone()}
        damaged[name][0] = value
        with pytest.raises(InputError, match="lie outside it"):
            ChannelCodebookWeight.from_tensors(damaged, weight.metadata())


@pytest.mark.parametrize("name", ["codes_b2", "levels", "bits", "outliers", "outlier_columns", "outlier_rows"])
def test_missing_and_short_tensors_are_refused(name):
    weight = packed()
    tensors = weight.tensors()
    for damaged in ({k: v for k, v in tensors.items() if k != name}, {**tensors, name: tensors[name][:-1]}):
        with pytest.raises(InputError):
            ChannelCodebookWeight.from_tensors(damaged, weight.metadata())
