import torch

from kernels.resident import planes
from kernels.resident.sparse import sparse_rows


def test_planes_come_back():
    torch.manual_seed(0)
    wanted = [torch.rand(70, 333) < 0.5, torch.rand(70, 333) < 0.1]
    packed = planes.pack(wanted, rows=16)
    assert packed.shape == (5, 11, 2, 16)
    for number, plane in enumerate(wanted):
        assert torch.equal(planes.unpack(packed, number, (70, 333)), plane)


def test_bit_b_of_word_k_is_column_32_k_plus_b():
    plane = torch.zeros(1, 96, dtype=torch.bool)
    plane[0, 64 + 31] = True
    assert planes.pack([plane], rows=1)[0, :, 0, 0].tolist() == [0, 0, -(1 << 31)]


def test_sparse_entries_come_back_from_every_slab():
    torch.manual_seed(0)
    mask = torch.rand(33, 1000) < 0.07
    mask[5] = False  # an empty row
    mask[:, 256:512] = False  # an empty slab
    codes = torch.randint(0, 256, (int(mask.sum()),))
    packed = sparse_rows(mask, codes, code_bits=8)
    assert packed.slab == 256 and packed.pointers.shape == (4, 34)
    found, values = packed.dense(1000)
    assert torch.equal(found, mask)
    assert torch.equal(values[mask], codes.int())


def test_a_slab_may_be_narrower_than_it_could():
    mask = torch.ones(2, 300, dtype=torch.bool)
    packed = sparse_rows(mask, torch.arange(600) % 16, code_bits=4, slab=100)
    assert packed.pointers.tolist() == [[0, 100, 200], [200, 300, 400], [400, 500, 600]]
    assert torch.equal(packed.dense(300)[1], (torch.arange(600) % 16).view(2, 300).int())
