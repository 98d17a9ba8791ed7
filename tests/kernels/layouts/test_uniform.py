"""Uniform grids: what decodes, what is stored, what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import InputError
from kernels.layouts import UniformWeight, load_packed, save_packed

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def parts(rows, columns, bits, group_size, *, symmetric=False, permuted=False, dtype=torch.float16, seed=0):
    """Arguments for `UniformWeight.pack`: random codes, zero points and scales on random grids."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    widths = torch.tensor([bits] * groups if isinstance(bits, int) else bits)
    per_column = widths[torch.arange(columns) // group_size]
    draw = torch.rand(rows, columns, generator=generator)
    zero_draw = torch.rand(rows, groups, generator=generator)
    return {
        "codes": (draw * 2**per_column).floor().to(torch.uint8),
        "scales": (0.01 + torch.rand(rows, groups, generator=generator)).to(dtype),
        "zeros": None if symmetric else (zero_draw * 2**widths).floor().to(torch.uint8),
        "bits": bits,
        "group_size": group_size,
        "permutation": torch.randperm(columns, generator=generator) if permuted else None,
    }


def expected(given_parts):
    """scale * (code - zero), column by column, in float64, rounded once; columns put back in their own order."""
    codes, scales, zeros = (given_parts[key] for key in ("codes", "scales", "zeros"))
    bits, group_size, permutation = (given_parts[key] for key in ("bits", "group_size", "permutation"))
    result = torch.empty(codes.shape, dtype=torch.float64)
    for j in range(codes.shape[1]):
        g = j // group_size
        width = bits if isinstance(bits, int) else bits[g]
        zero = 2 ** (width - 1) if zeros is None else zeros[:, g].double()
        at = j if permutation is None else int(permutation[j])
        result[:, at] = scales[:, g].double() * (codes[:, j].double() - zero)
    return result.float()


def packed_example(**changes):
    given_parts = parts(**{"rows": 5, "columns": 48, "bits": 3, "group_size": 16, **changes})
    return UniformWeight.pack(**given_parts), given_parts


CASES = {
    "one weight": {"rows": 1, "columns": 1, "bits": 1, "group_size": 1},
    "odd sizes": {"rows": 7, "columns": 13, "bits": 3, "group_size": 13},
    "odd groups": {"rows": 3, "columns": 35, "bits": 5, "group_size": 7},
    "576 in groups of 128": {"rows": 5, "columns": 576, "bits": 4, "group_size": 128},
    "1536 whole row": {"rows": 2, "columns": 1536, "bits": 2, "group_size": 1536},
    "symmetric": {"rows": 6, "columns": 40, "bits": 4, "group_size": 8, "symmetric": True},
    "symmetric 8 bits": {"rows": 6, "columns": 40, "bits": 8, "group_size": 40, "symmetric": True},
    "permuted": {"rows": 4, "columns": 50, "bits": 3, "group_size": 32, "permuted": True},
    "mixed widths": {"rows": 9, "columns": 70, "bits": [1, 4, 2, 4, 8, 3, 1], "group_size": 10},
    "mixed, last group narrow": {"rows": 3, "columns": 576, "bits": [2, 3, 1, 2, 4], "group_size": 128},
    "mixed, symmetric, permuted": {
        "rows": 3, "columns": 33, "bits": [2, 5, 2], "group_size": 16, "symmetric": True, "permuted": True,
    },
    "mixed, all alike": {"rows": 3, "columns": 32, "bits": [4, 4], "group_size": 16},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_decode_is_the_formula_and_survives_saving_bit_for_bit(tmp_path, case, dtype):
    packed, given_parts = packed_example(**case, dtype=dtype)
    # The difference is an integer and the scale has at most 24 bits: float32 and float64 round to the same product.
    assert torch.equal(packed.decode(), expected(given_parts))
    save_packed(tmp_path / "w.safetensors", {"layer": packed})
    loaded = load_packed(tmp_path / "w.safetensors")["layer"]
    assert isinstance(loaded, UniformWeight)
    assert loaded.metadata() == packed.metadata()
    assert loaded.scales().dtype == dtype
    assert torch.equal(loaded.decode(), packed.decode())


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 60),
    bits=st.integers(1, 8),
    data=st.data(),
    symmetric=st.booleans(),
    permuted=st.booleans(),
    mixed=st.booleans(),
)
@settings(max_examples=120)
def test_any_shape_width_and_grouping_decodes_to_the_formula(rows, columns, bits, data, symmetric, permuted, mixed):
    group_size = data.draw(st.integers(1, columns))
    groups = -(-columns // group_size)
    widths = data.draw(st.lists(st.integers(1, 8), min_size=groups, max_size=groups)) if mixed else bits
    packed, given_parts = packed_example(
        rows=rows, columns=columns, bits=widths, group_size=group_size, symmetric=symmetric, permuted=permuted
    )
    assert torch.equal(packed.decode(), expected(given_parts))
    assert torch.equal(packed.codes(), given_parts["codes"])
    again = UniformWeight.from_tensors(packed.tensors(), packed.metadata())
    assert torch.equal(again.decode(), packed.decode())
    code_bits = rows * (columns * bits if not mixed else sum(
        width * min(group_size, columns - g * group_size) for g, width in enumerate(widths)
    ))  # fmt: skip
    waste = 8 * packed.bytes_by_role()["code"] - code_bits
    assert 0 <= waste < 8 * len({*widths} if mixed else {bits})  # under a byte for each width in use


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decoding_to_another_dtype_rounds_once(dtype):
    packed, _ = packed_example(dtype=torch.float32)
    assert torch.equal(packed.decode(dtype), packed.decode().to(dtype))


def test_parts_can_be_read_back():
    packed, given_parts = packed_example(bits=[2, 7, 3], permuted=True)
    assert packed.group_widths() == [2, 7, 3]
    assert torch.equal(packed.codes(), given_parts["codes"])
    assert torch.equal(packed.zeros(), given_parts["zeros"])
    assert torch.equal(packed.scales(), given_parts["scales"])
    assert torch.equal(packed.permutation(), given_parts["permutation"])


def test_zero_points_of_a_symmetric_grid_are_mid_range_and_not_stored():
    packed, _ = packed_example(bits=[1, 4, 8], symmetric=True)
    assert packed.zeros().tolist() == [[1, 8, 128]] * 5
    assert "zero" not in packed.bytes_by_role()


def test_bytes_of_a_small_weight_counted_by_hand():
    # 5 x 48 codes of 3 bits = 720 bits = 90 bytes; 5 x 3 zero points of 3 bits = 45 bits = 6 bytes;
    # 15 scales of 2 bytes = 30 bytes; 48 column numbers of 2 bytes = 96 bytes.
    packed, _ = packed_example(permuted=True)
    assert packed.bytes_by_role() == {"code": 90, "zero": 6, "scale": 30, "permutation": 96}
    assert packed.nbytes() == 222
    assert packed.payload_bits() == pytest.approx(8 * 222 / 240)


def test_bytes_of_mixed_widths_counted_by_hand():
    # 3 rows, groups of 16, 16 and 1 columns of 2, 5 and 2 bits.
    # Codes: 3 x 17 of 2 bits = 102 bits = 13 bytes, 3 x 16 of 5 bits = 30 bytes. Zero points: 3 x 2 of 2 bits = 2
    # bytes, 3 of 5 bits = 2 bytes. 9 scales of 4 bytes. One byte a group for its width.
    packed, _ = packed_example(rows=3, columns=33, bits=[2, 5, 2], dtype=torch.float32)
    assert packed.bytes_by_role() == {"code": 43, "zero": 4, "scale": 36, "tag": 3}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_payload_bytes_equal_saved_tensor_bytes(tmp_path, case):
    packed, _ = packed_example(**case)
    save_packed(tmp_path / "w.safetensors", {"layer": packed})
    content = (tmp_path / "w.safetensors").read_bytes()
    assert packed.nbytes() == len(content) - 8 - int.from_bytes(content[:8], "little")
    assert sum(packed.bytes_by_role().values()) == packed.nbytes()


def test_column_numbers_take_four_bytes_only_where_two_do_not_reach():
    for columns, size in ((1 << 15, 2), ((1 << 15) + 1, 4)):
        packed, given_parts = packed_example(rows=1, columns=columns, bits=1, group_size=columns, permuted=True)
        assert packed.bytes_by_role()["permutation"] == size * columns
        assert torch.equal(packed.permutation(), given_parts["permutation"])


def test_moving_to_a_device_keeps_the_weight():
    packed, _ = packed_example(permuted=True)
    assert torch.equal(packed.to("cpu").decode(), packed.decode())


def test_repr_names_shape_and_bits():
    assert repr(packed_example()[0]) == "UniformWeight(5x48, 4.200 bits per weight)"


def without(name):
    return lambda tensors, metadata: tensors.pop(name)


def tensor(name, value):
    return lambda tensors, metadata: tensors.__setitem__(name, value)


def meta(name, value):
    return lambda tensors, metadata: metadata.__setitem__(name, value)


U8 = torch.uint8
DAMAGES = {
    "codes missing": (without("codes_b3"), "'codes_b3' .*missing"),
    "zeros missing": (without("zeros_b3"), "'zeros_b3' .*missing"),
    "scales missing": (without("scales"), "'scales' .*missing"),
    "codes too short": (tensor("codes_b3", torch.zeros(89, dtype=U8)), r"'codes_b3' .*\[89\].*\[90\]"),
    "codes not uint8": (tensor("codes_b3", torch.zeros(90, dtype=torch.int8)), "'codes_b3' .*int8.*must be uint8"),
    "codes not flat": (tensor("codes_b3", torch.zeros(9, 10, dtype=U8)), "'codes_b3'"),
    "zeros too long": (tensor("zeros_b3", torch.zeros(7, dtype=U8)), r"'zeros_b3' .*\[7\].*\[6\]"),
    "scales transposed": (tensor("scales", torch.ones(3, 5).half()), r"'scales' .*\[3, 5\].*\[5, 3\]"),
    "scales float64": (tensor("scales", torch.ones(5, 3).double()), "'scales' .*float64.*float16 or bfloat16"),
    "extra tensor": (tensor("codes_b4", torch.zeros(9, dtype=U8)), "does not know.*'codes_b4'"),
    "permutation short": (tensor("permutation", torch.arange(47).short()), "'permutation'"),
    "permutation int64": (tensor("permutation", torch.arange(48)), "'permutation' .*int64.*int16"),
    "column twice": (tensor("permutation", torch.zeros(48).short()), "permutation .*exactly once"),
    "column -1": (tensor("permutation", (torch.arange(48) - 1).short()), "permutation .*exactly once"),
    "column out of range": (tensor("permutation", (torch.arange(48) + 1).short()), "permutation .*exactly once"),
    "no shape": (lambda tensors, metadata: metadata.pop("shape"), "shape=None"),
    "shape of text": (meta("shape", ["5", "48"]), "shape="),
    "shape of one": (meta("shape", [240]), "shape="),
    "shape negative": (meta("shape", [-5, -48]), "shape="),
    "other shape": (meta("shape", [6, 48]), "'scales'"),
    "wide as the sea": (meta("shape", [5, 10**12]), "'scales'"),
    "one group as wide as the sea": (
        lambda tensors, metadata: (
            metadata.update(shape=[5, 10**12], group_size=10**12), tensors.update(scales=torch.ones(5, 1).half())
        ),
        "'codes_b3'",
    ),
    "bits 0": (meta("bits", 0), "bits=0 .*use 1 to 8"),
    "bits 9": (meta("bits", 9), "bits=9 .*use 1 to 8"),
    "bits text": (meta("bits", "3"), "bits='3'"),
    "bits float": (meta("bits", 3.0), "bits=3.0"),
    "bits bool": (meta("bits", True), "bits=True"),
    "bits list": (meta("bits", [3, 3, 3]), "bits="),
    "other bits": (meta("bits", 4), "'codes_b4' .*missing"),
    "no group bits": (meta("bits", None), "'group_bits' .*missing"),
    "group size 0": (meta("group_size", 0), "group_size=0"),
    "group size -1": (meta("group_size", -1), "group_size=-1"),
    "group size beyond the row": (meta("group_size", 49), "group_size=49"),
    "group size text": (meta("group_size", "16"), "group_size='16'"),
    "group size missing": (meta("group_size", None), "group_size=None"),
    "other group size": (meta("group_size", 8), "'scales'"),
    "symmetric text": (meta("symmetric", "no"), "symmetric='no'"),
    "symmetric missing": (meta("symmetric", None), "symmetric=None"),
    "symmetric with zeros": (meta("symmetric", True), "does not know.*'zeros_b3'"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_what_does_not_fit_together_is_refused_by_name(damage, said):
    packed, _ = packed_example()
    tensors, metadata = packed.tensors(), packed.metadata()
    damage(tensors, metadata)
    with pytest.raises(InputError, match=said):
        UniformWeight.from_tensors(tensors, metadata)


@pytest.mark.parametrize(
    ("group_bits", "said"),
    [
        (torch.tensor([2, 5], dtype=U8), r"'group_bits' .*\[2\].*\[3\]"),
        (torch.tensor([2, 5, 2]), "'group_bits' .*int64"),
        (torch.tensor([2, 0, 2], dtype=U8), r"bits=\[2, 0, 2\]"),
        (torch.tensor([2, 200, 2], dtype=U8), r"bits=\[2, 200, 2\]"),
        (torch.tensor([2, 2, 5], dtype=U8), "'codes_b2'"),
        (torch.tensor([2, 4, 2], dtype=U8), "'codes_b4' .*missing"),
    ],
)
def test_damaged_group_widths_are_refused(group_bits, said):
    packed, _ = packed_example(rows=3, columns=33, bits=[2, 5, 2])
    with pytest.raises(InputError, match=said):
        UniformWeight.from_tensors({**packed.tensors(), "group_bits": group_bits}, packed.metadata())


def test_group_widths_beside_one_width_for_all_are_refused():
    packed, _ = packed_example()
    with pytest.raises(InputError, match=r"does not know.*'group_bits'"):
        UniformWeight.from_tensors({**packed.tensors(), "group_bits": torch.full((3,), 3, dtype=U8)}, packed.metadata())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": [3, 3]}, "2 group widths for 3 groups of 16 in 48 columns"),
        ({"bits": 2}, "width 2 holds 0..3"),
        ({"bits": 9}, "width=9"),
        ({"scales": torch.ones(5, 4).half()}, "'scales'"),
        ({"scales": torch.ones(5, 3).double()}, "'scales'"),
        ({"permutation": torch.zeros(48, dtype=torch.int64)}, "exactly once"),
    ],
)
def test_packing_what_does_not_fit_is_refused(change, said):
    given_parts = parts(5, 48, 3, 16)
    with pytest.raises(InputError, match=said):
        UniformWeight.pack(**{**given_parts, **change})
