import copy

import pytest
import tiny
import torch

from harness.models.blocks import model_linears
from harness.quantize import QuantizedModel, check_shapes, install, quantize_model
from kernels.errors import InputError, NumericalError
from kernels.layouts import DenseWeight, load_packed, save_packed
from methods import create_method
from methods.base import MethodConfig, NominalBits, Provenance, QuantizationMethod

# `group_count` spares the search for it, which is tested elsewhere and takes longer than all the rest.
OPTIONS = {"fp16": {}, "rtn": {"group_size": 32}, "gptq": {"group_size": 32}, "sage-ptq": {"group_count": 2}}


class Returning(QuantizationMethod):
    """A method that packs whatever `change` makes of one layer's weight, and leaves the others alone."""

    name = "returning"
    Config = MethodConfig
    provenance = Provenance(paper="-", code="-", parity="-")
    layer = "model.layers.1.mlp.up_proj"

    def __init__(self, change):
        super().__init__()
        self.change = change

    def quantize_linear(self, weight, statistics=None, context=None):
        weight = weight.detach().clone()
        return self.change(weight) if context.name == self.layer else DenseWeight(weight)

    def nominal_bits(self, packed):
        return NominalBits(weight=32.0, scale=0.0)


@pytest.mark.parametrize(("name", "bits"), [("rtn", 3), ("gptq", 2)])
def test_the_model_holds_exactly_what_the_packed_tensors_decode_to(name, bits):
    model, before = tiny.build(), tiny.build()
    quantized = quantize_model(model, create_method(name, bits=bits, group_size=32), tiny.tokens())
    linears, originals = model_linears(model), model_linears(before)
    assert list(quantized.packed) == list(linears) == [layer.name for layer in quantized.layers]
    for layer, linear in linears.items():
        assert torch.equal(linear.weight, quantized.packed[layer].decode())
        assert not torch.equal(linear.weight, originals[layer].weight)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_everything_but_the_block_linears_stays_bit_for_bit(family):
    model, before = tiny.build(family), tiny.build(family)
    quantize_model(model, create_method("rtn", bits=2, group_size=32), None)
    weights = {f"{name}.weight" for name in model_linears(model)}
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new) == (name not in weights), name


@pytest.mark.parametrize("name", OPTIONS)
def test_saved_and_loaded_weights_give_bit_equal_logits(name, tmp_path):
    model, fresh = tiny.build(), tiny.build()
    quantized = quantize_model(model, create_method(name, **OPTIONS[name]), tiny.tokens())
    save_packed(tmp_path / "packed.safetensors", quantized.packed)
    install(fresh, QuantizedModel(load_packed(tmp_path / "packed.safetensors"), []))
    assert torch.equal(fresh(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_folded_parameters_are_installed_and_must_fit():
    model = tiny.build()
    quantized = quantize_model(copy.deepcopy(model), create_method("rtn", group_size=32), None)
    gain = torch.full((tiny.HIDDEN,), 3.0)
    install(model, QuantizedModel(quantized.packed, [], {"model.norm.weight": gain}))
    assert torch.equal(model.get_submodule("model.norm").weight, gain)
    for folded in ({"model.norm.weight": gain[1:]}, {"model.nom.weight": gain}):
        with pytest.raises(InputError, match=r"folded parameter model\.no"):
            install(model, QuantizedModel(quantized.packed, [], folded))


def test_weights_of_another_model_are_not_installed():
    model = tiny.build()
    packed = quantize_model(copy.deepcopy(model), create_method("rtn", group_size=32), None).packed
    name = "model.layers.1.mlp.up_proj"
    short = {key: value for key, value in packed.items() if key != name}
    with pytest.raises(InputError, match=name):
        install(model, QuantizedModel(short, []))
    with pytest.raises(InputError, match=rf"layer {name}: packed \(64, 96\), model \(96, 64\)"):
        install(model, QuantizedModel({**packed, name: packed["model.layers.1.mlp.down_proj"]}, []))


def quantized_in_samples_of(tokens, windows):
    method = create_method("gptq", bits=3, group_size=32)
    method.sample_tokens = tokens
    return quantize_model(tiny.build(), method, windows).packed


def same(first, second):
    return all(torch.equal(first[name].decode(), second[name].decode()) for name in first)


def test_a_method_gets_samples_as_short_as_it_wants_them():
    windows = tiny.tokens()
    whole = quantized_in_samples_of(None, windows)
    pieces = quantized_in_samples_of(8, windows)
    assert same(pieces, quantized_in_samples_of(None, windows.reshape(-1, 8)))
    assert not same(pieces, whole)
    # Nothing is thrown away: samples that do not come out even stay whole.
    assert same(quantized_in_samples_of(7, windows), whole)


def test_a_group_size_that_does_not_fit_names_the_layer_before_anything_changes():
    model, before = tiny.build(), tiny.build()
    with pytest.raises(InputError) as caught:
        quantize_model(model, create_method("gptq", group_size=100), tiny.tokens())
    assert "layer model.layers.0.self_attn.q_proj: group_size=100 does not fit in_features=64" in str(caught.value)
    assert all(map(torch.equal, model.parameters(), before.parameters()))


def test_check_shapes_looks_at_every_layer():
    # 48 divides 96 (down_proj) and not 64: the first layer is named. 64 divides 64 and not 96, but is a multiple of 32.
    check_shapes(tiny.build(), create_method("rtn", group_size=64))
    model = tiny.build()
    model.model.layers[2].mlp.down_proj = torch.nn.Linear(50, 64)
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.down_proj"):
        check_shapes(model, create_method("rtn", group_size=64))


def test_a_method_that_needs_calibration_does_not_run_without():
    with pytest.raises(InputError, match="'gptq' needs calibration text"):
        quantize_model(tiny.build(), create_method("gptq", group_size=32), None)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda w: DenseWeight(w.fill_(float("nan"))), "returned NaN or infinity for model.layers.1.mlp.up_proj"),
        (lambda w: DenseWeight(w.neg_().log_()), "returned NaN or infinity for model.layers.1.mlp.up_proj"),
        (lambda w: DenseWeight(w.T.contiguous()), "returned (64, 96) for model.layers.1.mlp.up_proj (96, 64)"),
        (lambda w: w, "for model.layers.1.mlp.up_proj"),
    ],
    ids=["nan", "inf", "transposed", "not packed"],
)
def test_what_a_method_returns_is_checked_and_the_layer_named(change, problem):
    with pytest.raises(NumericalError) as caught:
        quantize_model(tiny.build(), Returning(change), None)
    assert "method 'returning'" in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"mode": "weights-only"}])
def test_sage_x_names_a_bad_weight_too(options):
    model = tiny.build()
    model.get_submodule("model.layers.2.mlp.gate_proj").weight[1, 2:5] = float("nan")
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.gate_proj: 3 of 6144 weights are NaN or infinite"):
        quantize_model(model, create_method("sage-x", **options), tiny.tokens(8))


def test_a_block_that_fails_is_named():
    class Failing(type(create_method("sage-x"))):
        def quantize_block(self, view, contexts):
            raise NumericalError("no")

    method = Failing(create_method("sage-x", without=["allocation", "weighting"]).config)
    with pytest.raises(NumericalError, match=r"model\.layers\.0: no"):
        quantize_model(tiny.build(), method, tiny.tokens(8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["fp16", "rtn", "sage-ptq"])
def test_bad_weights_of_the_model_are_named(bad, method):
    model = tiny.build()
    model.get_submodule("model.layers.2.mlp.gate_proj").weight[1, 2:5] = bad
    with pytest.raises(InputError) as caught:
        quantize_model(model, create_method(method, **OPTIONS[method]), None)
    assert "model.layers.2.mlp.gate_proj: 3 of 6144 weights are NaN or infinite" in str(caught.value)


def test_the_log_holds_the_errors_of_each_layer():
    model, before = tiny.build(), tiny.build()
    rtn = create_method("rtn", bits=3, group_size=32)
    quantized = quantize_model(model, rtn, None)
    originals = model_linears(before)
    for layer, linear in zip(quantized.layers, model_linears(model).values(), strict=True):
        original = originals[layer.name].weight.double()
        expected = float((original - linear.weight).square().sum() / original.square().sum())
        assert layer.relative_error == pytest.approx(expected, rel=1e-5)
        assert layer.proxy_loss is None
        assert layer.shape == tuple(linear.weight.shape)
        assert (layer.nominal_weight_bits, layer.nominal_scale_bits) == (3.0, 1.0)
        assert layer.payload_bits == 8 * quantized.packed[layer.name].nbytes() / linear.weight.numel()


def test_the_proxy_loss_is_the_share_of_output_energy_lost():
    model, before = tiny.build(), tiny.build()
    logged = quantize_model(model, create_method("gptq", bits=3, group_size=32), tiny.tokens(8))
    name = "model.layers.0.self_attn.q_proj"
    seen = []
    before.get_submodule(name).register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    before(tiny.tokens(8))
    x, exact = seen[0]
    lost = (x @ model.get_submodule(name).weight.T - exact).square().sum() / exact.square().sum()
    assert logged.layers[0].name == name
    assert logged.layers[0].proxy_loss == pytest.approx(float(lost), rel=1e-4)


def test_progress_never_runs_backwards_and_ends_at_its_total():
    seen = []
    quantize_model(
        tiny.build(),
        create_method("gptq", group_size=32),
        tiny.tokens(),
        lambda done, total, what: seen.append((done / total, what)),
    )
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert any("block 2/3" in what for _, what in seen)
