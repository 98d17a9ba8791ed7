import copy

import pytest
import tiny
import torch

from harness.models.blocks import model_linears
from harness.models.load import load_model
from harness.models.reparameterize import reparameterize
from kernels.errors import InputError
from methods import create_method


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_stay_and_every_linear_changes(family):
    model = tiny.build(family)
    before = copy.deepcopy(model)
    reparameterize(model, seed=3)
    ids = tiny.tokens()
    assert relative(model(ids).logits, before(ids).logits) < 1e-4
    old = model_linears(before)
    for name, linear in model_linears(model).items():
        assert relative(linear.weight, old[name].weight) > 0.05, name


def test_channels_of_values_and_mlp_are_rescaled_not_only_gains_folded():
    model = tiny.build()
    before = model_linears(copy.deepcopy(model))
    reparameterize(model, seed=0)
    after = model_linears(model)
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # no norm stands in front of these
        ratio = after[f"model.layers.0.{name}"].weight / before[f"model.layers.0.{name}"].weight
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-5)
        assert float(ratio[0].log().std()) > 0.1


def test_the_seed_decides_the_factors():
    models = [tiny.build() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        reparameterize(model, seed)
    first, same, other = (model.get_submodule("model.layers.0.mlp.up_proj").weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_grid_that_held_the_weights_exactly_does_not_any_more():
    model = tiny.build()
    rtn = create_method("rtn", bits=4, group_size=32, scale_dtype="float32")

    def worst_error():
        errors = []
        for linear in model_linears(model).values():
            decoded = rtn.quantize_linear(linear.weight).decode()
            errors.append(relative(decoded, linear.weight))
        return min(errors), max(errors)

    for linear in model_linears(model).values():  # a source that was already quantized to 4 bits in groups of 32
        linear.weight.copy_(rtn.quantize_linear(linear.weight).decode())
    assert worst_error()[1] < 1e-6
    reparameterize(model, seed=0)
    assert worst_error()[0] > 0.02


def test_another_kind_of_block_is_refused_by_name():
    with pytest.raises(InputError, match="block 0 of OPTForCausalLM has no input_layernorm"):
        reparameterize(tiny.build("opt"), seed=0)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_blocks_with_other_norms_are_refused_because_the_logits_change(family):
    with pytest.raises(InputError, match="--reparameterize changed the logits of Gemma"):
        reparameterize(tiny.build(family), seed=0)


def test_a_loaded_model_is_changed_in_float32_and_then_cast(tiny_folder):
    plain = load_model(str(tiny_folder), "bfloat16").model
    moved = load_model(str(tiny_folder), "bfloat16", reparameterized=True, seed=1).model
    assert moved.dtype == torch.bfloat16
    assert relative(moved(tiny.tokens()).logits.float(), plain(tiny.tokens()).logits.float()) < 0.1
    name = "model.layers.0.mlp.down_proj"
    assert not torch.equal(moved.get_submodule(name).weight, plain.get_submodule(name).weight)
