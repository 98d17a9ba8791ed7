import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.resident import lane16
from kernels.resident.lane16 import Tile


@pytest.mark.parametrize("width", range(1, 9))
def test_every_bit_of_every_code_has_a_place_of_its_own(width):
    places = {
        (part.chunk, part.shift + bit): (part.code, part.low + bit)
        for part in lane16.fields(width)
        for bit in range(part.bits)
    }
    assert sorted(places) == [(chunk, bit) for chunk in range(width) for bit in range(16)]
    assert sorted(places.values()) == [(code, bit) for code in range(16) for bit in range(width)]


@settings(max_examples=40)
@given(
    width=st.integers(1, 8),
    rows=st.integers(1, 70),
    columns=st.integers(1, 600),
    words=st.sampled_from([1, 2, 4, 8]),
    block=st.sampled_from([1, 16, 64]),
)
def test_unpacking_gives_the_codes_back(width, rows, columns, words, block):
    codes = torch.randint(0, 1 << width, (rows, columns), dtype=torch.uint8)
    packed = lane16.pack(codes, width, Tile(block, words))
    assert torch.equal(lane16.unpack(packed, (rows, columns)), codes)
    # No bit is wasted but for padding.
    tiles = -(-rows // block) * -(-columns // (32 * words))
    assert packed.numel() * 32 == tiles * block * 32 * words * width


def test_a_field_is_a_run_of_columns():
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, 16:32] = 15
    words = lane16.pack(codes, 4, Tile(1, 8))
    assert (words[0, 0, 0] == 0x00F000F0).all()  # field 1 of chunk 0: bits 4 to 7 of both halves
    assert (words[0, 0, 1:] == 0).all()
