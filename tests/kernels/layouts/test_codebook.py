"""Codebook: what decodes, what is stored, what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import InputError
from kernels.layouts import CodebookWeight, load_packed, save_packed
from kernels.layouts.bitpack import pack_bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def parts(rows, columns, *, levels=15, index_bits=4, salient_bits=4, salient=0.05, dtype=torch.float16, seed=0):
    """Arguments for `CodebookWeight.pack`, drawn at random; `salient` is the share of salient weights."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(1, levels + 1, (rows, columns), generator=generator)
    index[torch.rand(rows, columns, generator=generator) < salient] = 0
    count = int((index == 0).sum())
    return {
        "negative": torch.rand(rows, columns, generator=generator) < 0.5,
        "index": index,
        "levels": torch.rand(levels, generator=generator).to(dtype),
        "index_bits": index_bits,
        "salient_bits": salient_bits,
        "salient_codes": torch.randint(0, 1 << (salient_bits - 1), (count,), generator=generator) if count else None,
        "row_scales": (1 + torch.rand(rows, generator=generator)).to(dtype) if count else None,
    }


def expected(given_parts):
    """The two formulas weight by weight, in float64, rounded once."""
    rows, columns = given_parts["index"].shape
    result = torch.empty(rows, columns, dtype=torch.float64)
    met = 0
    for i in range(rows):
        for j in range(columns):
            k = int(given_parts["index"][i, j])
            if k:
                magnitude = given_parts["levels"][k - 1].double()
            else:
                steps = (2 * int(given_parts["salient_codes"][met]) + 1) / 2 ** given_parts["salient_bits"]
                magnitude = given_parts["row_scales"][i].double() * steps
                met += 1
            result[i, j] = -magnitude if given_parts["negative"][i, j] else magnitude
    return result.float()


def packed_example(**changes):
    given_parts = parts(**{"rows": 6, "columns": 20, **changes})
    return CodebookWeight.pack(**given_parts), given_parts


CASES = {
    "one weight": {"rows": 1, "columns": 1, "salient": 0},
    "one salient weight": {"rows": 1, "columns": 1, "salient": 1.1},
    "odd sizes": {"rows": 7, "columns": 13},
    "576": {"rows": 3, "columns": 576, "salient": 0.01},
    "no salient weight": {"rows": 5, "columns": 9, "salient": 0},
    "all salient": {"rows": 5, "columns": 9, "salient": 1.1},
    "one level": {"rows": 5, "columns": 9, "levels": 1, "index_bits": 1},
    "fewer levels than the index can name": {"rows": 5, "columns": 9, "levels": 9},
    "63 levels": {"rows": 5, "columns": 90, "levels": 63, "index_bits": 6},
    "255 levels": {"rows": 5, "columns": 90, "levels": 255, "index_bits": 8},
    "1 salient bit": {"rows": 5, "columns": 9, "salient_bits": 1, "salient": 0.3},
    "2 salient bits": {"rows": 5, "columns": 9, "salient_bits": 2, "salient": 0.3},
    "8 salient bits": {"rows": 5, "columns": 9, "salient_bits": 8, "salient": 0.3},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_decode_is_the_formula_and_survives_saving_bit_for_bit(tmp_path, case, dtype):
    packed, given_parts = packed_example(**case, dtype=dtype)
    assert torch.equal(packed.decode(), expected(given_parts))
    save_packed(tmp_path / "w.safetensors", {"layer": packed})
    loaded = load_packed(tmp_path / "w.safetensors")["layer"]
    assert isinstance(loaded, CodebookWeight)
    assert loaded.metadata() == packed.metadata()
    assert torch.equal(loaded.decode(), packed.decode())
    content = (tmp_path / "w.safetensors").read_bytes()
    assert packed.nbytes() == len(content) - 8 - int.from_bytes(content[:8], "little")
    assert sum(packed.bytes_by_role().values()) == packed.nbytes()


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 30),
    index_bits=st.integers(1, 8),
    salient_bits=st.integers(1, 8),
    salient=st.sampled_from([0, 0.05, 0.5, 1.1]),
    data=st.data(),
)
@settings(max_examples=80)
def test_any_shape_and_widths_decode_to_the_formula(rows, columns, index_bits, salient_bits, salient, data):
    levels = data.draw(st.integers(1, (1 << index_bits) - 1))
    packed, given_parts = packed_example(
        rows=rows, columns=columns, levels=levels, index_bits=index_bits, salient_bits=salient_bits, salient=salient
    )
    assert torch.equal(packed.decode(), expected(given_parts))
    again = CodebookWeight.from_tensors(packed.tensors(), packed.metadata())
    assert torch.equal(again.decode(), packed.decode())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decoding_to_another_dtype_rounds_once(dtype):
    packed, _ = packed_example(dtype=torch.float32)
    assert torch.equal(packed.decode(dtype), packed.decode().to(dtype))


def test_planes_can_be_read_back():
    packed, given_parts = packed_example()
    assert torch.equal(packed.index().long(), given_parts["index"])
    assert torch.equal(packed.negative(), given_parts["negative"])
    assert packed.salient == int((given_parts["index"] == 0).sum())
    magnitudes = (2 * given_parts["salient_codes"] + 1) / 16
    assert torch.equal(packed.salient_magnitudes(), magnitudes)


def test_salient_codes_are_in_row_major_order_of_their_positions():
    index = torch.ones(3, 4, dtype=torch.long)
    index[0, 3] = index[2, 0] = index[2, 2] = 0
    packed = CodebookWeight.pack(
        torch.zeros(3, 4, dtype=torch.bool),
        index,
        torch.tensor([0.5]),
        index_bits=1,
        salient_bits=3,
        salient_codes=torch.tensor([0, 1, 3]),
        row_scales=torch.tensor([8.0, 0.0, 16.0]),
    )
    assert packed.decode().tolist() == [[0.5, 0.5, 0.5, 1.0], [0.5] * 4, [6.0, 0.5, 14.0, 0.5]]


def test_bytes_of_a_small_weight_counted_by_hand():
    # 6 x 20 weights: 120 signs in 15 bytes, 120 indices of 4 bits in 60 bytes, 15 levels of 2 bytes; 7 salient codes
    # of 3 bits in 3 bytes (21 bits), 6 row scales of 2 bytes.
    given_parts = parts(6, 20, salient=0)
    given_parts["index"].view(-1)[:7] = 0
    given_parts.update(salient_codes=torch.arange(7), row_scales=torch.ones(6).half())
    packed = CodebookWeight.pack(**given_parts)
    assert packed.bytes_by_role() == {"sign": 15, "index": 60, "codebook": 30, "code": 3, "scale": 12}
    assert packed.payload_bits() == pytest.approx(8 * 120 / 120)


def test_without_salient_weights_no_codes_and_no_row_scales_are_stored():
    packed, _ = packed_example(salient=0)
    assert set(packed.tensors()) == {"signs", "index", "levels"}


def test_one_salient_bit_is_the_sign_alone():
    packed, _ = packed_example(salient=0.3, salient_bits=1)
    assert "salient_codes" not in packed.tensors()
    assert set(packed.salient_magnitudes().tolist()) == {0.5}


def test_moving_to_a_device_keeps_the_weight():
    packed, _ = packed_example()
    assert torch.equal(packed.to("cpu").decode(), packed.decode())


def without(name):
    return lambda tensors, metadata: tensors.pop(name)


def tensor(name, value):
    return lambda tensors, metadata: tensors.__setitem__(name, value)


def meta(name, value):
    return lambda tensors, metadata: metadata.__setitem__(name, value)


U8 = torch.uint8
DAMAGES = {
    "signs missing": (without("signs"), "'signs' .*missing"),
    "index missing": (without("index"), "'index' .*missing"),
    "levels missing": (without("levels"), "'levels'|levels"),
    "salient codes missing": (without("salient_codes"), "'salient_codes' .*missing"),
    "row scales missing": (without("row_scales"), "'row_scales' .*missing"),
    "signs short": (tensor("signs", torch.zeros(14, dtype=U8)), r"'signs' .*\[14\].*\[15\]"),
    "index long": (tensor("index", torch.zeros(61, dtype=U8)), r"'index' .*\[61\].*\[60\]"),
    "index not uint8": (tensor("index", torch.zeros(60, dtype=torch.int8)), "'index' .*int8"),
    "levels int": (tensor("levels", torch.zeros(15, dtype=torch.int16)), "'levels' .*int16"),
    "levels as matrix": (tensor("levels", torch.zeros(3, 5).half()), "'levels'"),
    "too many levels": (tensor("levels", torch.zeros(16).half()), "16 levels .*1 to 15 fit"),
    "no level": (tensor("levels", torch.zeros(0).half()), "0 levels"),
    "scales of another dtype": (tensor("row_scales", torch.ones(6)), "'row_scales' .*float32.*float16"),
    "scales for other rows": (tensor("row_scales", torch.ones(7).half()), r"'row_scales' .*\[7\].*\[6\]"),
    "codes too long": (tensor("salient_codes", torch.zeros(99, dtype=U8)), r"'salient_codes' .*\[99\]"),
    "extra tensor": (tensor("mask", torch.zeros(15, dtype=U8)), "does not know.*'mask'"),
    "no shape": (lambda tensors, metadata: metadata.pop("shape"), "shape=None"),
    "other shape": (meta("shape", [6, 21]), "'signs'"),
    "wide as the sea": (meta("shape", [10**12, 10**12]), "'signs'"),
    "index bits 0": (meta("index_bits", 0), "'index_bits': 0"),
    "index bits 9": (meta("index_bits", 9), "'index_bits': 9"),
    "other index bits": (meta("index_bits", 5), "'index'"),
    "index bits text": (meta("index_bits", "4"), "'index_bits': '4'"),
    "index bits missing": (meta("index_bits", None), "'index_bits': None"),
    "salient bits 0": (meta("salient_bits", 0), "'salient_bits': 0"),
    "salient bits 9": (meta("salient_bits", 9), "'salient_bits': 9"),
    "salient bits bool": (meta("salient_bits", True), "'salient_bits': True"),
    "salient negative": (meta("salient", -1), "'salient': -1"),
    "more salient than weights": (meta("salient", 121), "'salient': 121.* 0 to 120"),
    "none salient but stored": (meta("salient", 0), "does not know.*'row_scales'"),
    "one bit but codes stored": (meta("salient_bits", 1), "does not know.*'salient_codes'"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_what_does_not_fit_together_is_refused_by_name(damage, said):
    packed, _ = packed_example()
    tensors, metadata = packed.tensors(), packed.metadata()
    damage(tensors, metadata)
    with pytest.raises(InputError, match=said):
        CodebookWeight.from_tensors(tensors, metadata)


def test_an_index_that_names_a_missing_level_is_refused_when_decoded():
    given_parts = parts(6, 20, levels=9)
    given_parts["index"][3, 4] = 12
    with pytest.raises(InputError, match="index plane names level 12 of 9"):
        CodebookWeight.pack(**given_parts).decode()


@pytest.mark.parametrize("change", [-1, 1])
def test_an_index_that_marks_another_number_of_salient_weights_is_refused_when_decoded(change):
    packed, given_parts = packed_example()
    index = given_parts["index"].clone()
    if change == 1:
        index[tuple((index > 0).nonzero()[0])] = 0
    else:
        index[tuple((index == 0).nonzero()[0])] = 1
    damaged = CodebookWeight.from_tensors({**packed.tensors(), "index": pack_bits(index, 4)}, packed.metadata())
    with pytest.raises(InputError, match=f"marks {packed.salient + change} salient weights, {packed.salient} are"):
        damaged.decode()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"index": torch.full((6, 20), 16)}, "width 4 holds 0..15"),
        ({"levels": torch.rand(16)}, "16 levels"),
        ({"levels": torch.rand(15).double()}, "'levels' .*float64"),
        ({"row_scales": None}, "need salient_codes and row_scales"),
        ({"row_scales": torch.ones(5).half()}, "'row_scales'"),
        ({"salient_bits": 9}, "width|'salient_bits'"),
        ({"salient_bits": 2}, "width 1 holds 0..1"),
    ],
)
def test_packing_what_does_not_fit_is_refused(change, said):
    with pytest.raises(InputError, match=said):
        CodebookWeight.pack(**{**parts(6, 20), **change})
