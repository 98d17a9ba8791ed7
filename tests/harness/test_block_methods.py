"""Methods that work on whole decoder blocks, plan for a whole model, or round activations, on tiny models."""

import pytest
import tiny
import torch

from harness.models.blocks import model_linears
from harness.quantize import QuantizedModel, install, quantize_model
from kernels.layouts import DenseWeight, MicroscalingWeight, load_packed, save_packed
from methods import BlockResult, create_method
from methods.base import MethodConfig, NominalBits, Provenance, QuantizationMethod

FAMILIES = ("llama", "opt", "neox")


def outputs_of_blocks(model, windows):
    """The outputs of every decoder block in an ordinary forward pass: a list of [samples, tokens, hidden]."""
    seen = [[] for _ in model.model.layers]
    handles = [
        block.register_forward_hook(lambda _, args, out, i=i: seen[i].append(out[0] if isinstance(out, tuple) else out))
        for i, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for window in windows:
            model(window[None])
    for handle in handles:
        handle.remove()
    return [torch.cat(outputs) for outputs in seen]


class Halving(QuantizationMethod):
    """Halves every weight of a block, and keeps what it was shown."""

    name = "halving"
    Config = MethodConfig
    provenance = Provenance(paper="-", code="-", parity="-")
    needs = "block"

    def __init__(self, stream):
        super().__init__()
        self.stream = stream
        self.hidden, self.targets = [], []

    def quantize_linear(self, weight, statistics=None, context=None):
        return DenseWeight(weight.detach() / 2)

    def quantize_block(self, view, contexts):
        self.hidden.append(view.hidden.clone())
        self.targets.append(view.targets)
        return BlockResult({name: self.quantize_linear(linear.weight) for name, linear in view.linears.items()})

    def nominal_bits(self, packed):
        return NominalBits(32.0, 0.0)


@pytest.mark.parametrize("stream", ["unquantized", "quantized", "both"])
def test_a_block_sees_the_activations_that_its_method_asks_for(stream):
    windows = tiny.tokens()
    model, method = tiny.build(), Halving(stream)
    unquantized = outputs_of_blocks(model, windows)
    quantize_model(model, method, windows)
    quantized = outputs_of_blocks(model, windows)
    expected = unquantized if stream == "unquantized" else quantized
    for index in (1, 2):
        assert torch.allclose(method.hidden[index], expected[index - 1], atol=1e-5)
        assert not torch.allclose(unquantized[index - 1], quantized[index - 1], atol=1e-2)
    for index in range(3):
        if stream == "both":
            assert torch.allclose(method.targets[index], unquantized[index], atol=1e-5)
        else:
            assert method.targets[index] is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["slim-llm-plus", "aptq"])
def test_block_methods_quantize_every_layer_of_every_family(family, name):
    options = {"slim-llm-plus": {"epochs": 2, "group_size": 16}, "aptq": {"group_size": 32}}[name]
    model, before = tiny.build(family), tiny.build(family)
    quantized = quantize_model(model, create_method(name, **options), tiny.tokens())
    originals = model_linears(before)
    for layer, linear in model_linears(model).items():
        assert torch.equal(linear.weight, quantized.packed[layer].decode())
        assert not torch.equal(linear.weight, originals[layer].weight)
    assert all(0 < layer.proxy_loss < 1 for layer in quantized.layers)


def test_clipping_of_a_block_brings_its_output_nearer_to_the_unquantized_model():
    method = create_method("slim-llm-plus", bits=3, group_size=16, epochs=12)
    quantized = quantize_model(tiny.build(), method, tiny.tokens(samples=8))
    losses = [layer.facts["block_loss"] for layer in quantized.layers]
    assert all(loss["last_epoch"] < loss["first_epoch"] for loss in losses)


def test_aptq_spreads_two_and_four_bits_over_the_model():
    quantized = quantize_model(tiny.build(), create_method("aptq", average_bits=3.0, group_size=32), tiny.tokens())
    bits = {name: packed.bits for name, packed in quantized.packed.items()}
    sizes = {name: packed.shape[0] * packed.shape[1] for name, packed in quantized.packed.items()}
    assert set(bits.values()) == {2, 4}
    average = sum(bits[name] * sizes[name] for name in bits) / sum(sizes.values())
    assert 2.8 < average <= 3.0
    assert {layer.facts.get("hessian") for layer in quantized.layers} == {None, "attention"}


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_that_look_at_outputs_know_the_bias(family):
    seen = {}

    class Looking(Halving):
        needs = "nothing"

        def quantize_linear(self, weight, statistics=None, context=None):
            seen[context.name] = context.bias
            return super().quantize_linear(weight)

    model = tiny.build(family)
    quantize_model(model, Looking("quantized"), None)
    for name, linear in model_linears(model).items():
        assert seen[name] is None if linear.bias is None else torch.equal(seen[name], linear.bias)
    assert any(bias is not None for bias in seen.values()) == (family != "llama")


def test_micromix_chooses_channels_on_the_unquantized_models_activations():
    windows = tiny.tokens()
    found, plain = {}, tiny.build()
    for name, linear in model_linears(plain).items():
        linear.register_forward_hook(
            lambda _, args, out, name=name: found.setdefault(name, []).append(args[0][0].abs().mean(dim=0))
        )
    with torch.no_grad():
        for window in windows:
            plain(window[None])
    quantized = quantize_model(tiny.build(), create_method("micromix"), windows)
    for name, packed in quantized.packed.items():
        expected = torch.stack(found[name]).amax(dim=0)[packed.tensors()["permutation"].long()]
        assert (expected[1:] >= expected[:-1] - 1e-5).all(), name


def test_activations_are_rounded_in_the_model_that_is_evaluated_and_in_the_one_that_is_loaded(tmp_path):
    windows = tiny.tokens()
    model, fresh = tiny.build(), tiny.build()
    quantized = quantize_model(model, create_method("micromix"), windows)
    packed = next(iter(quantized.packed.values()))
    assert isinstance(packed, MicroscalingWeight)
    rounded = model(windows).logits
    weights_alone = tiny.build()
    for name, linear in model_linears(weights_alone).items():
        linear.weight.data.copy_(quantized.packed[name].decode())
    assert not torch.allclose(rounded, weights_alone(windows).logits, atol=1e-4)
    linear = model_linears(model)["model.layers.0.mlp.up_proj"]
    packed = quantized.packed["model.layers.0.mlp.up_proj"]
    x = torch.randn(2, 3, tiny.HIDDEN)
    assert torch.equal(linear(x), torch.nn.functional.linear(packed.round_inputs(x), packed.decode(), linear.bias))
    save_packed(tmp_path / "packed.safetensors", quantized.packed)
    install(fresh, QuantizedModel(load_packed(tmp_path / "packed.safetensors"), []))
    assert torch.equal(fresh(windows).logits, rounded)
