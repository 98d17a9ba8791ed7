"""Methods that look at the whole model once more when its last layer is quantized."""

import pytest
import tiny
import torch

from harness.models.blocks import model_linears
from harness.quantize import install, quantize_model
from harness.quantized_cache import QuantizedEntry, entry_folder, load_quantized
from kernels.errors import InputError, NumericalError
from kernels.layouts import DenseWeight
from methods import LayerContext, ModelView, Refinement, create_method
from methods.rtn import Rtn
from methods.sage_x import SageX, distillation

LAYER, GAIN = "model.layers.1.mlp.up_proj", "model.norm.weight"
PHASES = {"quantize": {"seconds": 1.0}}


class Refining(Rtn):
    """Rounds to nearest, and hands back what `found` makes of the finished model."""

    def __init__(self, found):
        super().__init__(create_method("rtn", bits=3, group_size=32).config)
        self.found = found
        self.seen = None

    def refine(self, view):
        self.seen = {name: parameter.clone() for name, parameter in view.model.named_parameters()}
        return self.found(view)


def other(view, bits=3, factor=0.5, shape=None):
    """Another weight for LAYER."""
    weight = view.model.get_submodule(LAYER).weight * factor
    weight = weight if shape is None else weight[: shape[0]]
    return create_method("rtn", bits=bits, group_size=32).quantize_linear(weight, None, LayerContext(LAYER))


def halved(view):
    gain = view.model.get_parameter(GAIN)
    return Refinement({LAYER: other(view)}, {GAIN: (0.5 * gain).half()}, {"said": 7})


def test_a_refinement_takes_the_place_of_what_was_there():
    model, plain = tiny.build(), tiny.build()
    method = Refining(halved)
    refined = quantize_model(model, method, None)
    rounded = quantize_model(plain, create_method("rtn", bits=3, group_size=32), None)
    for name, parameter in plain.named_parameters():  # the method sees the finished model
        assert torch.equal(method.seen[name], parameter), name
        assert torch.equal(model.get_parameter(name), parameter) == (name not in (f"{LAYER}.weight", GAIN)), name
    assert list(refined.packed) == list(rounded.packed)
    assert torch.equal(model.get_submodule(LAYER).weight, refined.packed[LAYER].decode())
    assert torch.equal(refined.folded[GAIN], (0.5 * plain.get_parameter(GAIN)).half().float())
    assert refined.folded[GAIN].dtype == torch.float32
    first, *others = refined.layers
    assert first.facts == {**rounded.layers[0].facts, "said": 7}
    assert [layer.facts for layer in others] == [layer.facts for layer in rounded.layers[1:]]
    fresh = tiny.build()
    install(fresh, refined)
    assert torch.equal(fresh(tiny.tokens()).logits, model(tiny.tokens()).logits)


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (lambda view: Refinement({"model.lm_head": other(view)}, {}), "model.lm_head, which is no layer of the model"),
        (lambda view: Refinement({LAYER: other(view, bits=4)}, {}), f"{LAYER}, .* had another layout or size"),
        (lambda view: Refinement({LAYER: DenseWeight(torch.ones(96, 64))}, {}), f"{LAYER}, .* another layout or size"),
        (lambda view: Refinement({LAYER: other(view, shape=(8,))}, {}), f"{LAYER}, .* had another layout or size"),
        (lambda view: Refinement({}, {GAIN: torch.ones(3)}), f"{GAIN}, which has another shape"),
        (
            lambda view: Refinement({}, {"model.norm.bias": torch.ones(3)}),
            "model.norm.bias, which is no unquantized parameter",
        ),
        (
            lambda view: Refinement({}, {f"{LAYER}.weight": torch.ones(96, 64)}),
            f"{LAYER}.weight, which is no unquantized parameter",
        ),
        (lambda view: Refinement({}, {GAIN: torch.full((tiny.HIDDEN,), 1 / 3)}), f"{GAIN}, whose values do not fit"),
        (lambda view: Refinement({}, {GAIN: torch.full((tiny.HIDDEN,), torch.nan)}), f"{GAIN}, .* or NaN"),
    ],
)
def test_a_refinement_that_does_not_fit_is_named(found, problem):
    with pytest.raises(NumericalError, match=f"method 'rtn' refined {problem}"):
        quantize_model(tiny.build(), Refining(found), None)


def test_nan_in_a_refined_weight_is_named(monkeypatch):
    monkeypatch.setattr(Rtn, "quantize_linear", lambda self, weight, *_: DenseWeight(weight.detach().clone()))
    bad = torch.full(tuple(tiny.build().get_submodule(LAYER).weight.shape), torch.nan)
    with pytest.raises(NumericalError, match=f"returned NaN or infinity for {LAYER}"):
        quantize_model(tiny.build(), Refining(lambda view: Refinement({LAYER: DenseWeight(bad)}, {})), None)


def test_the_cache_keeps_the_refined_model_in_place_of_the_blocks():
    entry = QuantizedEntry("key")
    model = tiny.build()
    refined = quantize_model(model, Refining(halved), None, checkpoints=entry)
    size = entry.finish(PHASES)
    folder = entry_folder("key")
    kept = ["quantized.json", "whole.folded.safetensors", "whole.json", "whole.safetensors"]
    assert sorted(file.name for file in folder.iterdir()) == kept
    found, phases, same_size = load_quantized("key")
    assert (phases, same_size) == (PHASES, size)
    assert size == (folder / "whole.safetensors").stat().st_size
    assert list(found.packed) == list(refined.packed) == list(model_linears(model))
    assert [layer.as_record() for layer in found.layers] == [layer.as_record() for layer in refined.layers]
    fresh = tiny.build()
    install(fresh, found)
    assert torch.equal(fresh(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_a_model_that_is_changed_in_place_is_named():
    with pytest.raises(NumericalError, match=f"changed {GAIN} in place; `refine` must return what is new"):
        quantize_model(tiny.build(), Refining(lambda view: view.model.get_parameter(GAIN).mul_(2)), None)


def test_what_an_interrupted_run_has_refined_does_not_stay_behind():
    quantize_model(tiny.build(), Refining(halved), None, checkpoints=QuantizedEntry("key"))
    entry = QuantizedEntry("key")
    quantize_model(tiny.build(), Refining(lambda view: None), None, checkpoints=entry)
    entry.finish(PHASES)
    assert not (entry_folder("key") / "whole.safetensors").exists()
    found, _, _ = load_quantized("key")
    plain = quantize_model(tiny.build(), create_method("rtn", bits=3, group_size=32), None)
    assert torch.equal(found.packed[LAYER].decode(), plain.packed[LAYER].decode())


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.unlink()])
def test_a_refined_model_that_is_damaged_is_dropped(damage):
    entry = QuantizedEntry("key")
    quantize_model(tiny.build(), Refining(halved), None, checkpoints=entry)
    entry.finish(PHASES)
    damage(entry_folder("key") / "whole.safetensors")
    assert load_quantized("key") is None
    assert not entry_folder("key").exists()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("when", ["before", "behind"])
def test_an_interrupted_refinement_is_made_again_from_the_blocks(when, monkeypatch):
    """Before it is kept, or when it is kept and the entry is not finished."""

    def stopped(view):
        raise Stopped

    if when == "before":
        with pytest.raises(Stopped):
            quantize_model(tiny.build(), Refining(stopped), None, checkpoints=QuantizedEntry("key"))
    else:
        quantize_model(tiny.build(), Refining(halved), None, checkpoints=QuantizedEntry("key"))
    model, whole = tiny.build(), tiny.build()
    entry = QuantizedEntry("key")
    resumed = quantize_model(model, Refining(halved), None, checkpoints=entry)
    assert entry.restored_blocks == tiny.LAYERS
    quantize_model(whole, Refining(halved), None)
    assert torch.equal(resumed.packed[LAYER].decode(), whole.get_submodule(LAYER).weight)
    assert torch.equal(model(tiny.tokens()).logits, whole(tiny.tokens()).logits)
    entry.finish(PHASES)
    found, _, _ = load_quantized("key")
    assert torch.equal(found.packed[LAYER].decode(), resumed.packed[LAYER].decode())


@pytest.mark.parametrize("when", ["before", "behind"])
def test_sage_x_interrupted_in_its_last_training_goes_on_bit_for_bit(when, monkeypatch):
    """From the last block: the activations in front of it are what is kept."""
    monkeypatch.setattr(SageX, "sample_tokens", 8)
    monkeypatch.setattr("methods.sage_x.block.tune", lambda *_: 1.0)

    def run(checkpoints=None):
        model = tiny.build()
        options = {"budget": 2.6, "tuning": "model"}
        return model, quantize_model(model, create_method("sage-x", **options), tiny.tokens(4), checkpoints=checkpoints)

    def stopped(*_):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("methods.sage_x.method.distill" if when == "before" else "harness.quantize.install", stopped)
        run(QuantizedEntry("key"))
    entry = QuantizedEntry("key")
    (resumed, _), (whole, _) = run(entry), run()
    assert entry.restored_blocks == tiny.LAYERS - 1
    for (name, mine), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    entry.finish(PHASES)
    fresh = tiny.build()
    install(fresh, load_quantized("key")[0])
    assert torch.equal(fresh(tiny.tokens()).logits, resumed(tiny.tokens()).logits)


def test_a_model_that_comes_in_blocks_is_refused():
    model = tiny.build()
    model.model.layers[1].to("meta")
    method = create_method("sage-x", tuning="model")
    with pytest.raises(InputError, match="tuning='model' needs the whole model on one device"):
        method.study(ModelView(model, {}, tiny.tokens(8)))


@pytest.mark.parametrize(
    ("tuning", "dtype"), [("scales", torch.float16), ("model", torch.float16), ("model", torch.bfloat16)]
)
def test_training_works_in_sixteen_bits(tuning, dtype, monkeypatch):
    monkeypatch.setattr(SageX, "sample_tokens", 8)
    model = tiny.build("qwen2").to(dtype)
    quantized = quantize_model(model, create_method("sage-x", budget=2.6, tuning=tuning), tiny.tokens(8))
    for name, packed in quantized.packed.items():
        assert torch.equal(model.get_submodule(name).weight, packed.decode(dtype)), name
    for name, tensor in quantized.folded.items():
        assert tensor.dtype == dtype and torch.equal(model.get_parameter(name), tensor)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sage_x_is_trained_through_models_of_every_family(family, monkeypatch):
    """Blocks are not: that is tested elsewhere and takes longer than all the rest."""
    monkeypatch.setattr(SageX, "sample_tokens", 8)
    monkeypatch.setattr(distillation, "RATE", 1e-3)
    monkeypatch.setattr("methods.sage_x.block.tune", lambda *_: 1.0)
    model, original, text = tiny.build(family), tiny.build(family), tiny.tokens(16)
    quantized = quantize_model(model, create_method("sage-x", budget=2.6, tuning="model"), text)
    assert any(".layers." not in name for name in quantized.folded)  # the norm in front of the head
    _, after = quantized.layers[0].facts["held_out_divergence"]
    last = text.reshape(-1, 8)[-8:]  # an eighth of the samples
    known, found = (each(last).logits.log_softmax(-1) for each in (original, model))
    assert float((known.exp() * (known - found)).sum(-1).mean()) == pytest.approx(after, rel=1e-3)
