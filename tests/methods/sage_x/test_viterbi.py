"""The search: optimal where it can be checked by hand, and the same with and without a compiler."""

import itertools

import pytest
import torch

from kernels.layouts.trellis_tables import RATES, WIDTHS, distortions
from methods.sage_x import viterbi
from methods.sage_x.codebook import SEGMENT, encode_states
from methods.sage_x.viterbi import encode_segments, reversed_bits, search


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setattr(viterbi, "compiled", lambda: None)


def normal(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def closed_paths(widths, length, bits):
    """Every circular stream of a segment as the states it goes through, newest bit lowest."""
    steps = [widths[t % len(widths)] for t in range(length)]
    for codes in itertools.product(*(range(1 << step) for step in steps)):
        state = 0
        for _ in range(2):  # after one round every state is that of the circular stream
            path = []
            for step, code in zip(steps, codes, strict=True):
                state = ((state << step) & ((1 << bits) - 1)) | code
                path.append(state)
        yield codes, path


@pytest.mark.parametrize("widths", [(1,), (2,), (1, 2)])
def test_the_path_is_the_best_of_all_closed_paths_with_its_seam(widths, without_compiler):
    bits, length = 4, 6
    table = normal(1 << bits, seed=3)
    for seed in range(8):
        x = normal(length, seed)
        codes, values = search(x, torch.tensor([0, length]), widths, table)
        paths = list(closed_paths(widths, length, bits))
        seam_mask = (1 << (bits - widths[0])) - 1
        (mine,) = (path for found, path in paths if list(found) == codes.tolist())
        assert torch.equal(values, table[mine])
        costs = [
            float((x - table[path]).square().sum()) for _, path in paths if path[-1] & seam_mask == mine[-1] & seam_mask
        ]
        assert float((x - values).square().sum()) == pytest.approx(min(costs), rel=1e-5)


def test_the_seam_costs_next_to_nothing(without_compiler):
    bits, length = 4, 12
    table = normal(1 << bits, seed=3)
    mine = best = 0.0
    paths = torch.tensor([path for _, path in closed_paths((1,), length, bits)])
    for seed in range(20):
        x = normal(length, seed)
        mine += float((search(x, torch.tensor([0, length]), (1,), table)[1] - x).square().sum())
        best += float((table[paths] - x).square().sum(dim=1).min())
    assert best <= mine <= 1.05 * best


@pytest.mark.skipif(viterbi.compiled() is None, reason="no C++ compiler")
@pytest.mark.parametrize("rate_class", range(1, len(WIDTHS)))
def test_with_and_without_a_compiler_the_codes_are_the_same(rate_class, monkeypatch):
    # Segments of unlike length; rounded targets make ties likely.
    starts = torch.tensor([0, 17, 34, 64, 110])
    x = (normal(110, seed=rate_class) * 8).round() / 8
    compiled = encode_segments(x, starts, rate_class)
    monkeypatch.setattr(viterbi, "compiled", lambda: None)
    plain = encode_segments(x, starts, rate_class)
    assert torch.equal(compiled[0], plain[0])
    assert torch.equal(compiled[1], plain[1])


@pytest.mark.skipif(viterbi.compiled() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("widths", "bits"), [((1,), 12), ((1,), 5), ((2,), 6), ((7,), 11), ((7, 1), 12), ((1, 7), 12), ((2, 5, 3), 10)]
)
def test_the_compiled_search_is_the_plain_one_for_any_pattern_table_and_length(widths, bits, monkeypatch):
    # Around twice the warm-up the search at the seam stops being the whole segment.
    starts = torch.tensor([0, 3, 15, *itertools.accumulate([95, 96, 97, 256], initial=28)])
    x = (normal(int(starts[-1])) * 8).round() / 8
    table = (normal(1 << bits, seed=bits) * 16).round() / 16
    compiled = search(x, starts, widths, table)
    monkeypatch.setattr(viterbi, "compiled", lambda: None)
    plain = search(x, starts, widths, table)
    assert torch.equal(compiled[0], plain[0])
    assert torch.equal(compiled[1], plain[1])


def test_threads_do_not_change_the_codes():
    x, starts = normal(6 * 64), torch.arange(0, 6 * 64 + 1, 64)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(encode_segments(x, starts, 5)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("rate", [1.0, 1.5, 2.0, 3.0, 4.0])
def test_the_error_on_gaussian_samples_is_the_class_s_and_values_are_centroids(rate):
    rate_class = RATES.index(rate)
    x = normal(128 * SEGMENT, seed=17)
    _, values = encode_segments(x, torch.arange(0, x.numel() + 1, SEGMENT), rate_class)
    error = float((values - x).square().mean())
    assert error == pytest.approx(distortions()[rate_class], rel=0.03)
    # E[x | value] = value: no rescaling of the values would come nearer, and what the values lack is the error.
    assert float(x @ values / (values @ values)) == pytest.approx(1, abs=0.012)
    assert error + float(values.square().mean()) == pytest.approx(float(x.square().mean()), abs=0.01)


def test_states_follow_from_the_codes():
    table = normal(1 << 5, seed=1)
    x = normal(2 * SEGMENT)
    codes, values, states = encode_states(x, (1, 2), table)
    assert torch.equal(table[states], values)
    assert torch.equal(states & 1, codes & 1)


def test_reversing_bits_twice_changes_nothing():
    assert reversed_bits(3).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    order = reversed_bits(9)
    assert torch.equal(order[order], torch.arange(512))
