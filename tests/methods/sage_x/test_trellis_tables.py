"""Training of the tables: better than where it starts, and the same every time."""

import torch

from kernels.layouts.trellis_tables import STATE_BITS, TABLES, WIDTHS, rate_table
from methods.sage_x.codebook import distortion, train


def test_training_lowers_the_error_and_is_seeded():
    widths, bits = (2,), 6
    start, trained = train(widths, bits, seed=0, rounds=()), train(widths, bits, seed=0, rounds=(64,) * 6)
    errors = [distortion(widths, table, seed=9, segments=64) for table in (start, trained)]
    assert errors[1] < 0.97 * errors[0]
    assert errors[1] < 0.088  # a 6-bit trellis at 2 bits; a scalar quantizer reaches 0.1175
    assert torch.equal(trained, train(widths, bits, seed=0, rounds=(64,) * 6))
    assert torch.equal(trained, trained.half().float())


def test_the_shipped_tables_are_whole():
    assert TABLES.stat().st_size < 130_000
    for rate_class in range(1, len(WIDTHS)):
        values = rate_table(rate_class).values
        assert values.shape == (1 << STATE_BITS,)
        assert abs(float(values.mean())) < 0.02
