"""Dense bit streams: any width from 1 to 8, any count, nothing lost and nothing padded but the last byte."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from kernels.errors import InputError
from kernels.layouts import bitpack
from kernels.layouts.bitpack import pack_bits, packed_size, unpack_bits

WIDTHS = range(1, 9)


@st.composite
def widths_and_codes(draw):
    """A width and codes of that width, of any shape of one to three dimensions, empty ones included."""
    width = draw(st.integers(1, 8))
    shape = draw(st.lists(st.integers(0, 13), min_size=1, max_size=3))
    return width, draw(st_np.arrays(np.int64, tuple(shape), elements=st.integers(0, 2**width - 1)))


def as_one_number(codes, width):
    """The documented stream, said in one line: the integer sum of code_i * 2**(i * width), little-endian."""
    number = sum(int(code) << (i * width) for i, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * width // 8), "little"))


@given(widths_and_codes())
@settings(max_examples=200)
def test_unpacking_gives_back_what_was_packed(drawn):
    width, codes = drawn
    packed = pack_bits(torch.from_numpy(codes), width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-codes.size * width // 8),)
    unpacked = unpack_bits(packed, width, codes.size)
    assert unpacked.dtype == torch.uint8
    assert unpacked.tolist() == codes.reshape(-1).tolist()


@given(widths_and_codes())
@settings(max_examples=200)
def test_the_stream_is_the_documented_one(drawn):
    width, codes = drawn
    assert pack_bits(torch.from_numpy(codes), width).tolist() == as_one_number(codes.reshape(-1), width)


@given(st.integers(0, 10**9), st.integers(1, 8))
def test_packed_size_holds_the_codes_and_wastes_less_than_a_byte(count, width):
    assert 0 <= 8 * packed_size(count, width) - count * width < 8


def test_bit_order_by_hand():
    # Codes 5, 2, 7 of 3 bits: 5 = 101 in bits 0-2, 2 = 010 in bits 3-5, 7 = 111 in bits 6-8.
    # Byte 0 is bits 7..0 = 11 010 101, byte 1 holds the last bit of the 7.
    assert pack_bits(torch.tensor([5, 2, 7]), 3).tolist() == [0b11010101, 0b00000001]
    assert pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1]), 1).tolist() == [1, 1]
    assert pack_bits(torch.tensor([0xA, 0x3]), 4).tolist() == [0x3A]


@pytest.mark.parametrize("width", WIDTHS)
def test_every_value_of_a_width_survives(width):
    codes = torch.arange(1 << width)
    assert torch.equal(unpack_bits(pack_bits(codes, width), width, codes.numel()).long(), codes)


@pytest.mark.parametrize("width", WIDTHS)
def test_work_in_chunks_gives_the_same_stream(width, monkeypatch):
    torch.manual_seed(width)
    codes = torch.randint(0, 1 << width, (1003,))
    whole = pack_bits(codes, width)
    monkeypatch.setattr(bitpack, "_CHUNK_GROUPS", 7)
    assert torch.equal(pack_bits(codes, width), whole)
    assert torch.equal(unpack_bits(whole, width, 1003).long(), codes)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_the_dtype_of_the_codes_does_not_matter(width, dtype):
    codes = torch.arange(21) % min(1 << width, 100)
    assert torch.equal(pack_bits(codes.to(dtype), width), pack_bits(codes, width))


def test_codes_in_any_memory_order_are_packed_row_by_row():
    codes = torch.arange(12).view(3, 4)
    assert torch.equal(pack_bits(codes.T, 4), pack_bits(codes.T.contiguous(), 4))
    assert not torch.equal(pack_bits(codes.T, 4), pack_bits(codes, 4))


@pytest.mark.parametrize("width", WIDTHS)
def test_packed_and_unpacked_tensors_share_no_memory_with_their_source(width):
    codes = torch.ones(16, dtype=torch.uint8)
    packed = pack_bits(codes, width)
    unpacked = unpack_bits(packed, width, 16)
    codes.zero_()
    assert int(unpack_bits(packed, width, 16).sum()) == 16
    packed.zero_()
    assert int(unpacked.sum()) == 16


@pytest.mark.parametrize("width", [-1, 0, 9, 16])
def test_a_width_outside_1_to_8_is_refused(width):
    with pytest.raises(InputError, match=f"width={width} .*use 1 to 8"):
        pack_bits(torch.zeros(3, dtype=torch.uint8), width)
    with pytest.raises(InputError, match=f"width={width} .*use 1 to 8"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), width, 3)


@pytest.mark.parametrize(("codes", "width"), [([0, 4], 2), ([-1, 0], 3), ([256], 8), ([2], 1)])
def test_a_code_that_does_not_fit_is_refused(codes, width):
    with pytest.raises(InputError, match=rf"{min(codes)}\.\.{max(codes)}; width {width} holds 0\.\.{2**width - 1}"):
        pack_bits(torch.tensor(codes), width)


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(5, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.int8),
        torch.zeros(2, 2, dtype=torch.uint8),
    ],
    ids=["too short", "too long", "not uint8", "not flat"],
)
def test_a_stream_of_the_wrong_form_is_refused(packed):
    with pytest.raises(InputError, match=r"10 codes of 3 bits is uint8 \[4\]"):
        unpack_bits(packed, 3, 10)
