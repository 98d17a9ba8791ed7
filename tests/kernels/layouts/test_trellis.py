"""The trellis layout: what its bits mean, and that nothing is stored that is not counted."""

import itertools
import math

import pytest
import torch

from kernels.errors import InputError
from kernels.hadamard import rotate
from kernels.layouts import TrellisWeight
from kernels.layouts.trellis import column_bytes, segment_starts
from kernels.layouts.trellis_tables import RATES, STATE_BITS, WIDTHS, distortions, rate_table


def packed(rows, classes, seed=0, **options):
    """Random codes of the given classes; with them the codes, as they were handed in."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.tensor(classes)
    codes = torch.zeros(rows, len(classes), dtype=torch.uint8)
    starts = segment_starts(rows)
    for column, rate_class in enumerate(classes.tolist()):
        for start, stop in itertools.pairwise(starts):
            for t in range(stop - start):
                widths = WIDTHS[rate_class] or (0,)
                codes[start + t, column] = torch.randint(0, 1 << widths[t % len(widths)], (), generator=generator)
    column_scales = torch.randint(0, 100, (len(classes),), generator=generator).to(torch.uint8)
    row_scales = torch.randn(rows, generator=generator).half()
    return TrellisWeight.pack(codes, classes, column_scales, row_scales, **options), codes


def states_by_hand(codes, rate_class):
    """The state of each weight of one segment from the definition: the last bits of a circular stream, newest
    highest."""
    widths = WIDTHS[rate_class]
    stream, ends = [], []
    for t, code in enumerate(codes.tolist()):
        width = widths[t % len(widths)]
        stream += [(code >> (width - 1 - place)) & 1 for place in range(width)]
        ends.append(len(stream))
    return [
        sum(stream[(end - STATE_BITS + place) % len(stream)] << place for place in range(STATE_BITS)) for end in ends
    ]


@pytest.mark.parametrize("rate_class", range(1, len(WIDTHS)))
@pytest.mark.parametrize("rows", [16, 33, 64])
def test_a_value_is_the_table_entry_of_the_last_bits_of_its_circular_stream(rate_class, rows):
    weight, codes = packed(rows, [rate_class] * 2, rotated=False)
    table = rate_table(rate_class).values
    for column in range(2):
        expected = table[torch.tensor(states_by_hand(codes[:, column], rate_class))]
        assert torch.equal(weight.values()[column], expected)


def test_segments_are_streams_of_their_own():
    rows, rate_class = 600, 4
    starts = segment_starts(rows)
    assert starts == (0, 200, 400, 600)
    weight, codes = packed(rows, [rate_class])
    table = rate_table(rate_class).values
    for start, stop in itertools.pairwise(starts):
        expected = table[torch.tensor(states_by_hand(codes[start:stop, 0], rate_class))]
        assert torch.equal(weight.values()[0, start:stop], expected)


@pytest.mark.parametrize("is_rotated", [True, False])
def test_decoding_is_values_times_scales_rotated_back(is_rotated):
    weight, _ = packed(48, [0, 3, 5, 0, 9, 5], rotated=is_rotated)
    columns = weight.values() * torch.exp2(-weight.tensors()["column_scales"].float() / 16)[:, None]
    expected = (rotate(columns, inverse=True) if is_rotated else columns) * weight.row_scales().float()
    assert torch.allclose(weight.decode(), expected.T, rtol=1e-5, atol=1e-7)
    assert not weight.values()[0].any()
    assert not weight.values()[3].any()


def test_the_bits_are_those_of_the_formula():
    rows, classes = 128, [0, 1, 3, 3, 5, 9, 15, 2]
    weight, _ = packed(rows, classes)
    bits = rows * sum(RATES[c] for c in classes) + len(classes) * (4 + 8) + rows * 16
    assert 8 * weight.nbytes() == bits
    assert weight.payload_bits() == bits / (rows * len(classes))
    assert weight.bytes_by_role() == {
        "code": rows * sum(RATES[c] for c in classes) / 8,
        "index": len(classes) / 2,
        "scale": len(classes) + 2 * rows,
    }


def test_a_class_of_one_and_a_half_bits_takes_96_bits_for_64_rows():
    assert column_bytes(64, RATES.index(1.5)) == 96 / 8
    assert column_bytes(64, 0) == 0
    assert column_bytes(33, 1) == 5  # whole bytes


def test_a_rebuilt_weight_is_the_same_and_reads_its_columns_at_the_same_places():
    weight, _ = packed(100, [3, 0, 7, 1, 15])
    again = TrellisWeight.from_tensors(weight.tensors(), weight.metadata())
    assert torch.equal(again.decode(), weight.decode())
    offsets = weight.column_offsets().tolist()
    assert offsets[0] == 0
    assert offsets[-1] + column_bytes(100, 15) == weight.tensors()["codes"].numel()


def test_what_does_not_fit_together_is_refused():
    weight, _ = packed(32, [1, 5])
    tensors, metadata = weight.tensors(), weight.metadata()
    with pytest.raises(InputError, match="out_features=15: the trellis layout needs 16 or more"):
        TrellisWeight.from_tensors(tensors, {**metadata, "shape": [15, 2]})
    with pytest.raises(InputError, match="rotated=None"):
        TrellisWeight.from_tensors(tensors, {"shape": [32, 2]})
    with pytest.raises(InputError, match=r"tensor 'codes' .* must be uint8 \[12\]"):
        TrellisWeight.from_tensors({**tensors, "codes": tensors["codes"][:-1]}, metadata)
    with pytest.raises(InputError, match="does not know"):
        TrellisWeight.from_tensors({**tensors, "more": tensors["codes"]}, metadata)


def test_the_tables_are_sorted_by_rate_and_each_beats_the_scalar_quantizer_of_its_rate():
    found = distortions()
    assert list(RATES) == sorted(RATES)
    assert all(after < before for before, after in itertools.pairwise(found))
    # Lloyd-Max for N(0, 1) at 1, 2, 3 and 4 bits (Max 1960), and Shannon's bound below everything.
    for rate, scalar in ((1, 0.36338), (2, 0.11748), (3, 0.03455), (4, 0.00950)):
        assert found[RATES.index(rate)] < (0.77 if rate == 1 else 0.66) * scalar
    assert all(error > math.pow(4, -rate) for rate, error in zip(RATES[1:], found[1:], strict=True))


def test_a_class_between_two_is_better_than_mixing_them():
    found = dict(zip(RATES, distortions(), strict=True))
    assert found[1.5] < 0.85 * (found[1] + found[2]) / 2
    for low, middle, high in zip(RATES[1:], RATES[2:], RATES[3:], strict=False):
        share = (high - middle) / (high - low)
        assert found[middle] < share * found[low] + (1 - share) * found[high]
