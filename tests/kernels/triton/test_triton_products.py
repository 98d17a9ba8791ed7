"""The Triton kernels against `decode()` in float64: interpreted on a CPU, compiled where there is a GPU."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import compile_kernels
import examples
from triton.compiler.errors import CompilationError

from kernels.triton import launch, tuning
from kernels.triton.tuning import Launch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ACCELERATOR_ERROR = getattr(torch, "AcceleratorError", None)  # torch before 2.8 has none
# Odd sizes, partial groups and blocks, rows of SmolLM2 and LLaMA, grouped queries; few weights, the interpreter is slow
SHAPES = {
    "codebook-4": [(17, 130), (70, 576), (5, 11008)],
    "codebook-3": [(33, 300)],
    "codebook-2-salient-5%": [(17, 200)],
    "codebook-none-salient": [(64, 256)],
    "codebook-float32": [(17, 130)],
    **{f"uniform-{bits}-g128": [(33, 200)] for bits in range(1, 9)},
    "uniform-4-g128": [(70, 576)],
    "uniform-3-row": [(33, 300)],
    "uniform-4-g16-symmetric": [(64, 130)],
    "uniform-4-g96": [(17, 250)],
    "uniform-2-g300": [(17, 700)],
    "uniform-4-act-order": [(40, 300)],
    "uniform-mixed": [(17, 400)],
    "binary-g128": [(33, 300)],
    "binary-row-no-mean": [(33, 300)],
    "binary-bfloat16": [(17, 130)],
    "partial-g128": [(70, 300)],
    "partial-row": [(33, 200)],
    "partial-g300": [(17, 350)],
    "residual-128": [(70, 300)],
    "residual-100": [(33, 250)],
    "residual-all-columns": [(17, 300)],
    "residual-none-salient": [(64, 256)],
}


def gpu_matrix(weight):
    matrix = launch.gpu_matrix([weight], DEVICE)
    assert matrix is not None
    return matrix


@pytest.fixture
def poisoned(monkeypatch):
    """Every buffer that a launch asks for is full of NaN."""

    given = torch.empty

    def empty(*size, **options):
        made = given(*size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(launch.torch, "empty", empty)


def test_every_layout_has_a_shape():
    assert SHAPES.keys() == examples.LAYOUTS.keys()


@pytest.mark.parametrize("layout", SHAPES)
def test_products_are_those_of_the_decoded_weight(layout, poisoned):
    torch.manual_seed(0)
    for seed, shape in enumerate(SHAPES[layout]):
        weight = examples.make(layout, shape, seed)
        matrix = gpu_matrix(weight)
        for dtype, vectors in ((torch.float32, 1), (torch.float16, 1), (torch.bfloat16, 3)):
            inputs = torch.randn(vectors, shape[1]).to(dtype)
            found = matrix.multiply(inputs.to(DEVICE)).cpu()
            examples.check_product(found, examples.exact_product(weight, inputs))


@pytest.mark.parametrize("layout", ["codebook-4", "uniform-3-g128", "partial-row", "residual-100"])
def test_up_to_sixteen_vectors_and_more(layout, poisoned):
    weight = examples.make(layout, (33, 200))
    matrix = gpu_matrix(weight)
    for vectors in (2, 20):
        inputs = torch.randn(vectors, 200, dtype=torch.float16)
        examples.check_product(matrix.multiply(inputs.to(DEVICE)).cpu(), examples.exact_product(weight, inputs))


@pytest.mark.parametrize("layout", SHAPES)
def test_prefill_decodes_the_weight_exactly(layout, poisoned):
    weight = examples.make(layout, (33, 300))
    matrix = gpu_matrix(weight)
    decoded = matrix.decode(torch.float32).cpu()
    exact = weight.decode(torch.float32)
    if layout in ("uniform-8-g128",):  # two products of a scale are rounded instead of one
        torch.testing.assert_close(decoded, exact, rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(decoded, exact)


@pytest.mark.parametrize(
    "layout", ["codebook-4", "uniform-mixed", "uniform-4-act-order", "partial-g128", "residual-100"]
)
def test_prefill_multiplies_by_rows_decoded_to_a_scratch_matrix(layout, poisoned, monkeypatch):
    monkeypatch.setattr(launch, "_SCRATCH_WEIGHTS", 64 * 512)  # two pieces
    weight = examples.make(layout, (70, 300))
    inputs = torch.randn(launch.MOST_VECTORS + 1, 300, dtype=torch.float16)
    found = gpu_matrix(weight).multiply(inputs.to(DEVICE)).cpu()
    examples.check_product(found, examples.exact_product(weight, inputs))


@pytest.mark.parametrize("layout", ["codebook-4", "partial-g128"])
def test_any_number_of_splits_gives_the_same(layout, poisoned, monkeypatch):
    weight = examples.make(layout, (17, 600))
    inputs = torch.randn(1, 600)
    matrix = gpu_matrix(weight)
    found = []
    for splits in (1, 2, 3):
        monkeypatch.setattr(launch, "chosen_launch", lambda *_, splits=splits: Launch(splits, 1))
        found.append(matrix.multiply(inputs.to(DEVICE)).cpu())
        assert torch.equal(found[-1], matrix.multiply(inputs.to(DEVICE)).cpu())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def test_each_column_of_a_codebook_alone_gives_that_column():
    weight = examples.make("codebook-4", (17, 40))
    matrix = gpu_matrix(weight)
    for column in range(40):
        one = torch.zeros(1, 40)
        one[0, column] = 1
        assert torch.equal(matrix.multiply(one.to(DEVICE)).cpu()[0], weight.decode()[:, column])


def test_a_bias_is_added_by_the_reduction():
    weight = examples.make("uniform-4-g128", (17, 300))
    inputs, bias = torch.randn(2, 300), torch.randn(17)
    found = gpu_matrix(weight).multiply(inputs.to(DEVICE), bias.to(DEVICE)).cpu()
    examples.check_product(found, examples.exact_product(weight, inputs) + bias.double())


@pytest.mark.parametrize("layout", ["codebook-4", "uniform-4-g128", "binary-g128", "partial-g128"])
def test_matrices_with_one_input_are_stacked(layout, poisoned):
    weights = [examples.make(layout, (rows, 300), seed) for seed, rows in enumerate((64, 128, 50))]
    matrix = launch.gpu_matrix(weights, DEVICE)
    inputs = torch.randn(1, 300)
    expected = torch.cat([examples.exact_product(weight, inputs) for weight in weights], dim=1)
    examples.check_product(matrix.multiply(inputs.to(DEVICE)).cpu(), expected)


@pytest.mark.parametrize("layout", ["codebook-4", "residual-100"])
def test_a_copy_takes_no_more_memory_than_its_own(layout, poisoned):
    weight = examples.make(layout, (17, 300))
    matrix = gpu_matrix(weight)
    (words,) = matrix.codes()
    buffer = torch.zeros(10 * words.numel(), dtype=torch.int32, device=DEVICE)  # as of a band
    part = buffer[words.numel() : 2 * words.numel()].view(words.shape)
    part.copy_(words)
    matrix.replace_codes([part])
    copied = matrix.copy()
    (own,) = copied.codes()
    assert own.untyped_storage().nbytes() == 4 * words.numel() and copied.nbytes == matrix.nbytes
    buffer.zero_()
    inputs = torch.randn(1, 300)
    examples.check_product(copied.multiply(inputs.to(DEVICE)).cpu(), examples.exact_product(weight, inputs))


def test_matrices_that_do_not_fit_together_are_not_stacked():
    codebook, uniform = examples.make("codebook-4", (64, 300)), examples.make("uniform-4-g128", (64, 300))
    odd = examples.make("codebook-4", (65, 300))
    assert launch.gpu_matrix([codebook, uniform], DEVICE) is None
    assert launch.gpu_matrix([odd, codebook], DEVICE) is None  # 65 rows do not fill their last block
    # Salient columns lie elsewhere in each.
    assert launch.gpu_matrix([examples.make("residual-128", (64, 300), seed) for seed in (1, 2)], DEVICE) is None


def test_a_form_takes_little_more_than_the_stored_tensors():
    for layout, most in (("codebook-4", 1.04), ("uniform-4-g128", 1.02), ("residual-128", 1.09), ("binary-g128", 1.01)):
        weight = examples.make(layout, (512, 4096))
        assert weight.nbytes() <= gpu_matrix(weight).nbytes <= most * weight.nbytes()


@pytest.mark.parametrize("layout", ["codebook-2-salient-5%", "partial-row"])
def test_programs_of_few_slabs_share_their_sparse_entries(layout, poisoned, monkeypatch):
    weight = examples.make(layout, (17, 1100))  # one slab of about 55 entries a row, or five of about 25; five tiles
    inputs = torch.randn(1, 1100)
    matrix = gpu_matrix(weight)
    for splits in (3, 5):
        monkeypatch.setattr(launch, "chosen_launch", lambda *_, splits=splits: Launch(splits, 1))
        examples.check_product(matrix.multiply(inputs.to(DEVICE)).cpu(), examples.exact_product(weight, inputs))


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    """(tune with these times, what is chosen now) for a matrix of nine tiles, with nothing measured yet."""
    monkeypatch.setenv("SAGEBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_measured", {})
    tuning._stored.cache_clear()
    cpu, size = torch.device("cpu"), ("codebook", 5, 128, 9, 1, torch.float16)
    chosen = lambda: tuning.chosen_launch(*size, cpu)  # noqa: E731
    yield (
        lambda times, **options: tuning.tune(tuning.launch_key(*size), 9, lambda: times(chosen()), cpu, **options),
        chosen,
    )
    tuning._stored.cache_clear()


def test_tuning_keeps_the_fastest_choice(tuner, monkeypatch):
    tune, chosen = tuner
    assert tune(lambda launch: abs(launch.splits - 4) + launch.stages) == Launch(4, 1) == chosen()
    tuning._stored.cache_clear()
    monkeypatch.setattr(tuning, "_measured", {})
    assert chosen() == Launch(4, 1)  # from the file


def test_tuning_tries_as_many_splits_as_there_are_tiles(tuner):
    tune, _ = tuner
    tried = []
    best = tune(lambda launch: tried.append(launch) or -launch.splits, staged=False)
    assert [launch.splits for launch in tried] == [1, 2, 4, 8, 9] and best.splits == 9
    assert len({launch.stages for launch in tried}) == 1


def test_tuning_passes_over_what_the_device_has_no_room_for(tuner):
    tune, chosen = tuner

    def times(launch):
        if launch.stages == 2 or launch.splits == 1:
            raise tuning.OutOfResources(300_000, 232_448, "shared memory")
        return launch.stages

    assert tune(times) == Launch(9, 1) == chosen()
    with pytest.raises(tuning.OutOfResources):
        tuning.tune("another", 1, lambda: times(Launch(1, 1)), torch.device("cpu"))


@pytest.mark.parametrize(
    "error",
    [
        CompilationError("def kernel(): ...", None, "no"),
        RuntimeError("PassManager::run failed"),
        tuning.PTXASError("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_tuning_passes_over_what_does_not_compile(tuner, error):
    tune, chosen = tuner

    def times(launch):
        if launch.splits != 2:
            raise error
        return launch.stages

    assert tune(times) == Launch(2, 1) == chosen()
    with pytest.raises(type(error)):
        tuning.tune("another", 1, lambda: times(Launch(1, 1)), torch.device("cpu"))


@pytest.mark.parametrize(
    "error",
    [
        *([] if ACCELERATOR_ERROR is None else [ACCELERATOR_ERROR("an illegal memory access was encountered")]),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:30],
)
def test_an_error_of_the_device_ends_tuning(tuner, error):
    tune, chosen = tuner
    before, tried = chosen(), []

    def times(launch):
        tried.append(launch)
        if len(tried) == 2:
            raise error
        return 1.0

    with pytest.raises(type(error)):
        tune(times)
    assert len(tried) == 2
    assert chosen() == before  # nothing is kept of it


class Recorded:
    """A kernel that notes how it is launched: its name, its constants, its warps."""

    def __init__(self, kernel, seen):
        self._kernel, self._seen = kernel, seen

    def __getitem__(self, grid):
        def run(*arguments, num_warps, **options):
            self._seen.append((self._kernel, options, num_warps))
            return self._kernel[grid](*arguments, num_warps=num_warps, **options)

        return run


def test_kernels_are_compiled_in_tests_with_the_warps_that_they_are_launched_with(monkeypatch):
    seen = []
    names = ("table_kernel", "dot_kernel", "reduce_kernel", "decode_kernel", "scatter_kernel")
    originals = [getattr(launch.kernels, name) for name in names]
    for name, kernel in zip(names, originals, strict=True):
        monkeypatch.setattr(launch.kernels, name, Recorded(kernel, seen))
    for layout in ("codebook-4", "uniform-4-g128", "residual-100"):
        matrix = gpu_matrix(examples.make(layout, (17, 300)))
        matrix.multiply(torch.randn(1, 300, dtype=torch.float16).to(DEVICE))
        matrix.decode(torch.float16)
    monkeypatch.undo()
    assert {id(kernel) for kernel, _, _ in seen} == {id(kernel) for kernel in originals}
    for kernel, constants, asked in seen:
        assert compile_kernels.warps(kernel, constants) == asked, constants


def test_no_split_is_empty():
    assert Launch(16, 2).fitted(43) == Launch(15, 2)
    assert Launch(16, 2).fitted(3) == Launch(3, 2)
