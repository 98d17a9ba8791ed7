"""The resident form of trellis weights: every state is one window of one stream, and the rotation is two products."""

import itertools

import pytest
import torch

from kernels.hadamard import rotate
from kernels.layouts.trellis import segment_starts
from kernels.layouts.trellis_tables import STATE_BITS, WIDTHS
from kernels.random_weights import random_trellis
from kernels.resident.trellis import (
    rotate_back,
    segment_words,
    tables,
    trellis_matrix,
    window_starts,
)


@pytest.mark.parametrize("rows", [16, 33, 192, 300, 520])
def test_a_window_of_the_words_is_the_state_of_a_weight(rows):
    weight = random_trellis((rows, 48), seed=rows)
    form = trellis_matrix(weight)
    octets = form.words.view(torch.uint8).long()
    windows, sizes = window_starts(), segment_words(rows)
    found = torch.zeros(48, rows)
    for rate_class in range(1, len(WIDTHS)):
        first, last = form.bounds[rate_class : rate_class + 2].tolist()
        for place, column in enumerate(form.columns[first:last].tolist()):
            begin = int(form.begins[rate_class]) + place * int(sizes[rate_class, -1])
            for segment, (start, stop) in enumerate(itertools.pairwise(segment_starts(rows))):
                bits = 16 * (begin + int(sizes[rate_class, segment])) + windows[rate_class, : stop - start]
                byte = (bits // 8).long()
                window = octets[byte] | octets[byte + 1] << 8 | octets[byte + 2] << 16
                states = (window >> bits % 8) & ((1 << STATE_BITS) - 1)
                found[column, start:stop] = tables()[rate_class][states]
    assert torch.equal(found, weight.values())


def test_columns_stand_by_class_and_those_of_zeros_are_left_out():
    weight = random_trellis((32, 200), seed=0)
    form = trellis_matrix(weight)
    classes = weight.classes()[form.columns.long()]
    assert form.bounds[0] == form.bounds[1] == 0
    assert form.bounds[-1] == form.columns.numel() == int((weight.classes() != 0).sum())
    for rate_class, (first, last) in enumerate(itertools.pairwise(form.bounds.tolist())):
        assert (classes[first:last] == rate_class).all()
    assert torch.equal(form.factors, weight.column_factors()[form.columns.long()])


@pytest.mark.parametrize("rows", [16, 33, 192, 300, 576, 1536, 4096, 11008 // 8])
def test_the_rotation_in_small_products_is_that_of_the_layout(rows):
    torch.manual_seed(rows)
    z = torch.randn(3, rows)
    exact = rotate(z.double(), inverse=True)
    assert (rotate_back(z) - exact).norm() <= 1e-6 * exact.norm()


def test_a_form_takes_little_more_than_the_stored_tensors():
    weight = random_trellis((1536, 576), seed=0, classes=(3, 5, 6))
    assert weight.nbytes() < sum(part.numel() * part.element_size() for part in trellis_matrix(weight).tensors())
    assert sum(part.numel() * part.element_size() for part in trellis_matrix(weight).tensors()) < 1.07 * weight.nbytes()
