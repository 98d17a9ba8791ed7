"""The compiled CPU products against `decode()` in float64, for every instruction set that this CPU has."""

import sys
from pathlib import Path

import pytest
import torch

from kernels.cpu import build, cpu_matrix
from kernels.cpu.library import TILE
from kernels.cpu.signs import signs_apart
from kernels.resident import code_matrix, lane16

sys.path.insert(0, str(Path(__file__).parents[1]))
import examples

SHAPES = [(1, 64), (17, 130), (64, 576), (70, 600), (192, 1536)]
SETS = [name for name in build.supported() if build.library_path(name) is not None]
needs_compiler = pytest.mark.skipif(not SETS, reason="no C++ compiler")


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_CPU", request.param)
    return request.param


@needs_compiler
@pytest.mark.parametrize("layout", examples.LAYOUTS)
def test_products_are_those_of_the_decoded_weight(layout, instruction_set):
    torch.manual_seed(0)
    for seed, shape in enumerate(SHAPES):
        weight = examples.make(layout, shape, seed)
        matrix = cpu_matrix([weight])
        assert matrix is not None
        for dtype, vectors in zip(examples.TOLERANCE, (1, 3, 6), strict=True):
            if shape[0] == 1 and dtype == torch.bfloat16:
                continue  # a single output may be small by chance, beside what rounding the inputs costs
            for count in {1, vectors}:
                inputs = torch.randn(count, shape[1]).to(dtype)
                examples.check_product(matrix.multiply(inputs), examples.exact_product(weight, inputs))


@needs_compiler
@pytest.mark.parametrize("layout", ["codebook-4", "uniform-4-g128", "partial-g128", "residual-128"])
def test_the_longest_rows_of_llama(layout, instruction_set):
    weight = examples.make(layout, (17, 11008))
    for dtype in examples.TOLERANCE:
        inputs = torch.randn(1, 11008).to(dtype)
        examples.check_product(cpu_matrix([weight]).multiply(inputs), examples.exact_product(weight, inputs))


@needs_compiler
def test_matrices_with_one_input_stand_side_by_side(instruction_set):
    shape = (40, 576)
    names = ("codebook-4", "codebook-3", "uniform-4-g128", "residual-128", "partial-row", "binary-g128", "binary-g128")
    weights = [examples.make(name, shape, seed) for seed, name in enumerate(names)]
    for count in (1, 5):
        inputs = torch.randn(count, 576)
        found = cpu_matrix(weights).multiply(inputs)
        assert found.shape == (count, 40 * len(names))
        for part, weight in zip(found.split(40, dim=1), weights, strict=True):
            examples.check_product(part, examples.exact_product(weight, inputs))


@needs_compiler
@pytest.mark.parametrize(
    "layout", ["codebook-4", "uniform-3-g128", "uniform-5-g128", "uniform-7-g128", "partial-g128", "residual-100"]
)
def test_each_column_alone_gives_that_column(layout, instruction_set):
    weight = examples.make(layout, (40, 333))
    found = cpu_matrix([weight]).multiply(torch.eye(333))
    torch.testing.assert_close(found, weight.decode().T, rtol=2e-6, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("layout", ["codebook-4", "codebook-3", "codebook-float32"])
def test_codebook_columns_are_exact(layout, instruction_set):
    weight = examples.make(layout, (65, 300))
    assert torch.equal(cpu_matrix([weight]).multiply(torch.eye(300)), weight.decode().T)


@needs_compiler
@pytest.mark.parametrize("layout", ["codebook-4", "uniform-4-g128", "residual-128", "partial-row"])
def test_nothing_is_written_beside_the_outputs(layout, instruction_set):
    weight = examples.make(layout, (33, 200))
    matrix = cpu_matrix([weight])
    guarded = torch.full((5, 33), float("nan"))
    inputs = torch.randn(3, 200)
    guarded[1:4].copy_(torch.full((3, 33), float("nan")))
    matrix.multiply_into(inputs, guarded[1:4])
    examples.check_product(guarded[1:4], examples.exact_product(weight, inputs))
    assert guarded[0].isnan().all() and guarded[4].isnan().all()


@needs_compiler
def test_inputs_may_have_any_shape_and_stride():
    weight = examples.make("codebook-4", (48, 96))
    inputs = torch.randn(96, 2, 3).permute(1, 2, 0)
    found = cpu_matrix([weight]).multiply(inputs)
    assert found.shape == (2, 3, 48)
    examples.check_product(found, examples.exact_product(weight, inputs))


@needs_compiler
def test_special_numbers_survive_the_conversions():
    weight = examples.make("binary-row-no-mean", (1, 32))
    column = torch.zeros(5, 32, dtype=torch.float16)
    column[:, 0] = torch.tensor([65504.0, -6e-8, 6.1e-5, 1.0, float("nan")])
    expected = (column.float() * weight.decode()[0]).sum(1)
    found = cpu_matrix([weight]).multiply(column)[:, 0]
    assert torch.equal(found[:4], expected[:4].half())
    assert found[4].isnan()


@needs_compiler
def test_a_form_takes_little_more_than_the_stored_tensors():
    for layout, most in (("codebook-4", 1.05), ("uniform-4-g128", 1.02), ("residual-128", 1.03), ("binary-g128", 1.01)):
        weight = examples.make(layout, (512, 4096))
        assert weight.nbytes() <= cpu_matrix([weight]).nbytes * 1.001 <= most * weight.nbytes()


def test_signs_apart_take_no_more_and_lie_where_the_kernel_looks():
    form = code_matrix(examples.make("codebook-4", (70, 100)), TILE)
    (before,), (after,) = form.segments, signs_apart(form).segments
    assert after.words.numel() + after.signs.numel() == before.words.numel()
    codes = lane16.unpack(before.words, form.shape)
    assert torch.equal(lane16.unpack(after.words, form.shape), codes & 15)
    # Row 0, lookup p: the codes that lie in the low nibbles of word p / 2 (moved by 4 bits where p is odd).
    for lookup in range(8):
        for byte in range(4):
            code, lane = 4 * (lookup // 2) + lookup % 2 + 2 * (byte % 2), byte // 2
            negative = int(after.signs[0, 0, 0, 0, 0]) >> (8 * byte + lookup) & 1
            assert negative == int(codes[0, 2 * code + lane]) >> 4


def test_signs_stay_with_codes_that_have_no_mirror():
    form = code_matrix(examples.make("uniform-5-g128", (8, 64)), TILE)
    assert [part.signs for part in signs_apart(form).segments] == [None]


def test_torch_means_no_library(monkeypatch):
    monkeypatch.setenv("SAGEBENCH_CPU", "torch")
    assert cpu_matrix([examples.make("codebook-4", (8, 64))]) is None


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("SAGEBENCH_CPU", "avx1024")
    with pytest.raises(ValueError, match="SAGEBENCH_CPU='avx1024' cannot be used on this CPU"):
        build.chosen()


def test_without_a_compiler_there_is_no_library_and_a_warning(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.library_path.cache_clear()
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        assert build.library_path("plain") is None
    build.library_path.cache_clear()
