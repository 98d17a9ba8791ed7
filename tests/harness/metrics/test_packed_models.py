"""Metrics of a packed model are those of its decoded dense twin, whichever product computes a layer's output."""

import copy

import documents
import pytest
import tiny
import torch

import kernels.linear
from harness.metrics.divergence import divergence
from harness.metrics.perplexity import cut_windows
from harness.metrics.zeroshot import zeroshot
from harness.models.blocks import model_linears
from harness.reference import build_reference
from harness.zeroshot.model import InMemoryModel
from harness.zeroshot.tasks import task_data
from kernels.linear import PackedLinear
from kernels.products import kept_matrix
from methods import LayerStatistics, create_method

QUESTIONS, CHOICES = 20, 4
WINDOW = 12  # no more vectors than kernels answer for
# A method for each kind of kernel, and one whose format rounds inputs too.
METHODS = ("rtn", "binary", "pb-llm", "billm", "sage-ptq", "micromix")
# In nats an answer of up to five tokens. A kernel adds up in another order, so that outputs of layers, and logits of
# about ten, may be one step of the dtype apart.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 4e-1}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
methods = pytest.mark.parametrize("method", METHODS)


def twins(method, dtype):
    """The tiny model with packed layers, and with dense ones that hold their decoded weights."""
    packed = tiny.build().to(dtype)
    options = {"group_size": 32} if method == "binary" else tiny.OPTIONS.get(method, {})
    quantizer = create_method(method, **options)
    torch.manual_seed(0)
    statistics = {
        width: LayerStatistics.from_inputs(torch.randn(4, 32, width)) for width in (tiny.HIDDEN, tiny.INTERMEDIATE)
    }
    for name, linear in model_linears(packed).items():
        weight = quantizer.quantize_linear(linear.weight, statistics[linear.in_features])
        packed.set_submodule(name, PackedLinear.from_packed(weight, linear.bias))
    dense = copy.deepcopy(packed)
    for name in model_linears(tiny.build()):
        dense.set_submodule(name, dense.get_submodule(name).to_linear(dtype))
    assert not any(isinstance(module, PackedLinear) for module in dense.modules())
    return packed, dense


@pytest.fixture
def used(monkeypatch):
    """Whether products went the ways that there are here: through a kernel where the layout has one."""
    products, weights = set(), set()
    real = kernels.linear.pick_product

    def pick(inputs, packed):
        product = real(inputs, packed)
        products.add(product.__name__)
        weights.add(packed)
        return product

    monkeypatch.setattr(kernels.linear, "pick_product", pick)

    def check():
        has_kernel = any(kept_matrix(packed) is not None for packed in weights)
        assert weights and ("kernel_product" in products) == has_kernel

    return check


@pytest.fixture
def answers(monkeypatch):
    """Log-likelihoods of all answers, [questions, choices], of each run of a task."""
    runs = []
    real = InMemoryModel._loglikelihood_tokens

    def score(self, requests, *more, **named):
        found = real(self, requests, *more, **named)
        runs.append(torch.tensor([likelihood for likelihood, _ in found], dtype=torch.float64).view(-1, CHOICES))
        return found

    monkeypatch.setattr(InMemoryModel, "_loglikelihood_tokens", score)
    return runs


@methods
@dtypes
def test_zero_shot_answers_have_the_likelihoods_of_the_dense_twin(method, dtype, answers, used, tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_DATA", str(documents.write(tmp_path, "arc_easy", count=QUESTIONS)))
    task = task_data("arc_easy", "local")
    packed, dense, unquantized = (
        zeroshot(model, tiny.tokenizer(), task) for model in (*twins(method, dtype), tiny.build().to(dtype))
    )
    used()
    ours, expected, before = answers
    assert ours.shape == (QUESTIONS, CHOICES)
    assert (ours - expected).abs().max() <= TOLERANCE[dtype]
    assert (ours - before).abs().max() > 5 * TOLERANCE[dtype]  # that of another model would be seen
    best = expected.topk(2, dim=1).values
    clear = (best[:, 0] - best[:, 1] > 2 * TOLERANCE[dtype]).tolist()
    assert sum(clear) >= QUESTIONS // 2
    for mine, its, certain in zip(packed.scores["acc"].correct, dense.scores["acc"].correct, clear, strict=True):
        assert mine == its or not certain
    if dtype == torch.float32:
        assert packed.scores == dense.scores
    assert packed.prompts_sha256 == dense.prompts_sha256 == unquantized.prompts_sha256


@methods
@dtypes
def test_divergence_is_that_of_the_dense_twin(method, dtype, used):
    ids = tiny.tokens(1, 5 * WINDOW).flatten()
    reference = build_reference("k", tiny.build().to(dtype), cut_windows(ids, WINDOW))
    packed, dense = (divergence(model, ids, reference, context=WINDOW) for model in twins(method, dtype))
    used()
    assert packed.window_kl == pytest.approx(dense.window_kl, abs=TOLERANCE[dtype] / 20)
    assert (packed.dtype, packed.tokens) == (dense.dtype, dense.tokens)
    assert min(dense.window_kl) > TOLERANCE[dtype] / 20
    if dtype == torch.float32:
        assert packed.same_top == dense.same_top
        assert packed.rms_target == pytest.approx(dense.rms_target, rel=1e-4)
