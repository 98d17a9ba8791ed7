"""Training through the whole model, on one small enough to reason about."""

from types import SimpleNamespace

import pytest
import small_block
import torch
from torch import nn

from kernels.errors import InputError, NumericalError
from kernels.layouts import TrellisWeight
from methods import ModelView, QuantizedView, create_method
from methods.sage_x import distillation
from methods.sage_x.distillation import distill, head_inputs

TOKENS, VOCABULARY = 32, 40


class Model(nn.Module):
    """Two blocks between embeddings and a head."""

    def __init__(self, bias=False, softcap=None, tied=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(3)
        self.config = SimpleNamespace(final_logit_softcapping=softcap)
        self.embed = nn.Embedding(VOCABULARY, small_block.HIDDEN)
        self.blocks = nn.Sequential(small_block.Block(), small_block.Block())
        for block in self.blocks:
            for linear in (block.gate, block.up, block.down):
                linear.weight.copy_(torch.randn_like(linear.weight) / linear.in_features**0.5)
                if bias:
                    linear.bias = nn.Parameter(torch.randn(linear.out_features))
        self.norm = nn.RMSNorm(small_block.HIDDEN)
        self.head = nn.Linear(small_block.HIDDEN, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.requires_grad_(False)
        self.to(dtype)

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids, use_cache=False):
        logits = self.head(self.norm(self.blocks(self.embed(ids))))
        cap = self.config.final_logit_softcapping
        return SimpleNamespace(logits=logits if cap is None else cap * torch.tanh(logits / cap))


def windows(samples, seed=0):
    return torch.randint(VOCABULARY, (samples, TOKENS), generator=torch.Generator().manual_seed(seed))


def quantized(samples=32, **options):
    """A model and its copy with weights of two bits: what to train it on, and the unquantized one's head inputs."""
    model, original = Model(**options), Model(**options)
    targets = head_inputs(ModelView(original, {}, windows(samples)))
    method = create_method("sage-x", budget=2.6, mode="weights-only")
    packed = {}
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, nn.Linear):
            packed[name] = method.quantize_linear(module.weight)
            module.weight.copy_(packed[name].decode())
    assert len(packed) == 6
    return original, QuantizedView(model, packed, windows(samples)), targets


def divergence(original, model, ids):
    known, found = (each(ids).logits.float().log_softmax(-1) for each in (original, model))
    return float((known.exp() * (known - found)).sum(-1).mean())


def refined(view, refinement):
    for name, packed in refinement.packed.items():
        view.model.get_parameter(f"{name}.weight").copy_(packed.decode())
    for name, tensor in refinement.parameters.items():
        view.model.get_parameter(name).copy_(tensor)
    return view.model


KINDS = [{}, {"bias": True}, {"softcap": 2.0}, {"tied": True}, {"dtype": torch.float16}, {"dtype": torch.bfloat16}]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_model_comes_nearer_to_the_unquantized_one_on_other_text(options):
    original, view, targets = quantized(**options)
    unseen = windows(32, seed=1)
    before = divergence(original, view.model, unseen)
    refinement = distill(view, targets)
    first, last = refinement.facts["held_out_divergence"]
    held_out = view.windows[28:]
    exact = options.get("dtype", torch.float32) == torch.float32
    assert first == pytest.approx(divergence(original, view.model, held_out), rel=1e-4 if exact else 0.02)
    model = refined(view, refinement)
    assert divergence(original, model, unseen) < 0.97 * before
    # What is noted is that of the model as it is stored.
    assert last == pytest.approx(divergence(original, model, held_out), rel=1e-4 if exact else 0.03)


def test_the_size_of_the_parts_does_not_matter(monkeypatch):
    (_, view, targets), (_, again, _) = quantized(), quantized()
    whole = distill(view, targets)
    monkeypatch.setattr(distillation, "_LOGITS", 100 * VOCABULARY)
    parts = distill(again, targets)
    assert parts.facts["held_out_divergence"] == pytest.approx(whole.facts["held_out_divergence"], rel=1e-3)


def test_scales_of_fewer_digits_are_judged_as_they_are_stored():
    original, view, targets = quantized()
    coarse = create_method("sage-x", budget=2.6, mode="weights-only", scale_dtype="bfloat16")
    packed = {}
    for name in view.packed:
        linear = view.model.get_submodule(name)
        packed[name] = coarse.quantize_linear(linear.weight)
        linear.weight.copy_(packed[name].decode())
    view = QuantizedView(view.model, packed, view.windows)
    refinement = distill(view, targets)
    model = refined(view, refinement)
    after = divergence(original, model, view.windows[28:])
    assert refinement.facts["held_out_divergence"][1] == pytest.approx(after, rel=1e-4)


def test_row_scales_and_gains_change_and_nothing_else():
    _, view, targets = quantized()
    before = {name: tensor.clone() for name, tensor in view.model.state_dict().items()}
    refinement = distill(view, targets)
    assert all(torch.equal(tensor, before[name]) for name, tensor in view.model.state_dict().items())
    assert refinement.packed.keys() == view.packed.keys()
    for name, packed in refinement.packed.items():
        old, new = view.packed[name].tensors(), packed.tensors()
        assert [part for part in new if not torch.equal(new[part], old[part])] == ["row_scales"]
        assert new["row_scales"].dtype == old["row_scales"].dtype
    assert sorted(refinement.parameters) == ["blocks.0.norm.weight", "blocks.1.norm.weight", "norm.weight"]
    for name, gain in refinement.parameters.items():
        assert gain.dtype == torch.float16  # an unquantized parameter counts 16 bits
        assert not torch.equal(gain.float(), before[name])
    assert not view.model.head._forward_pre_hooks
    assert not view.model.blocks[0].gate._forward_hooks


def test_it_is_the_same_every_time_and_says_how_far_it_is():
    said = []
    (_, view, targets), (_, again, _) = quantized(), quantized()
    view = QuantizedView(view.model, view.packed, view.windows, lambda done, total: said.append((done, total)))
    first, second = distill(view, targets), distill(again, targets)
    for name, packed in first.packed.items():
        assert torch.equal(packed.row_scales(), second.packed[name].row_scales())
    assert said == [(done, said[-1][1]) for done in range(1, said[-1][1] + 1)]


def test_what_does_not_help_is_undone(monkeypatch):
    _, view, targets = quantized()
    state = {name: tensor.clone() for name, tensor in view.model.state_dict().items()}
    monkeypatch.setattr(distillation, "RATE", 3.0)
    refinement = distill(view, targets)
    assert (refinement.packed, refinement.parameters) == ({}, {})
    before, after = refinement.facts["held_out_divergence"]
    assert not after < before
    assert all(torch.equal(tensor, state[name]) for name, tensor in view.model.state_dict().items())
    assert not view.model.blocks[0].gate._forward_hooks


def test_a_single_sample_is_too_little_to_train_on():
    _, view, targets = quantized(samples=1)
    assert distill(view, targets) is None


@pytest.mark.parametrize(("samples", "epochs"), [(9, 4), (73, 2), (289, 1)])
def test_many_samples_are_seen_less_often(samples, epochs, monkeypatch):
    taken = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(distillation, "BATCH_TOKENS", 2 * TOKENS)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: taken.append(step(self)))
    _, view, targets = quantized(samples)
    distill(view, targets)
    held_out = max(1, round(samples / 8))
    assert len(taken) == epochs * -(-(samples - held_out) // 2)


def test_a_model_without_a_head_is_refused():
    model = Model()
    model.get_output_embeddings = lambda: None
    with pytest.raises(InputError, match="Model has no linear output head"):
        head_inputs(ModelView(model, {}, windows(2)))


def test_a_model_with_more_behind_its_head_is_refused(monkeypatch):
    model = Model()
    forward = model.forward
    model.forward = lambda ids, use_cache: SimpleNamespace(logits=forward(ids, use_cache).logits / 8)
    with pytest.raises(InputError, match="Model does more behind its output head than a soft cap"):
        head_inputs(ModelView(model, {}, windows(2)))


def test_logits_that_overflow_are_named():
    _, view, targets = quantized()
    view.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NumericalError, match="logits overflow"):
        distill(view, targets)


def test_layers_of_other_layouts_are_left_alone():
    _, view, targets = quantized()
    other = create_method("rtn", bits=8, group_size=32).quantize_linear(view.model.blocks[0].gate.weight)
    mixed = QuantizedView(view.model, {**view.packed, "blocks.0.gate": other}, view.windows)
    refinement = distill(mixed, targets)
    assert "blocks.0.gate" not in refinement.packed
    assert all(isinstance(packed, TrellisWeight) for packed in refinement.packed.values())
