"""A budget for the whole model: methods that plan over all layers."""

import pytest
import tiny
import torch

from harness.ledger import build_ledger
from harness.models.blocks import model_linears
from harness.quantize import quantize_model
from methods import ModelView, create_method
from methods.sage_x.norms import input_energies


@pytest.mark.parametrize("options", [{"budget": 3.0}, {"budget": 3.0, "mode": "weights-only"}])
def test_a_whole_model_is_within_its_budget(options):
    model = tiny.build("llama")
    quantized = quantize_model(model, create_method("sage-x", **options), tiny.tokens(8))
    ledger = build_ledger(model, quantized, None)
    assert 2.9 < ledger["payload_bits"] <= 3.0
    assert ledger["nominal_weight_bits"] + ledger["nominal_scale_bits"] == pytest.approx(ledger["payload_bits"])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_without_data_layers_behind_a_norm_are_found_in_every_family(family):
    """In each of the three blocks all layers but those that read what attention or an activation gives."""
    model = tiny.build(family)
    linears = model_linears(model)
    behind = {"llama": 5, "qwen2": 5, "gemma2": 5, "gemma3": 5, "opt": 4, "neox": 2}[family]
    energies = input_energies(ModelView(model, linears, None))
    assert len(energies) == behind * tiny.LAYERS
    assert all(energies[name].shape == (linears[name].in_features,) for name in energies)


def test_without_data_norm_gains_move_bits_between_columns():
    told, alike = (
        quantize_model(tiny.build("llama"), create_method("sage-x", mode="weights-only", without=without), None).packed
        for without in ([], ["gains"])
    )
    differ = {name.rpartition(".")[2] for name in told if not torch.equal(told[name].classes(), alike[name].classes())}
    assert differ == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def test_budgets_differ_between_layers_by_their_sensitivity():
    model = tiny.build("llama")
    method = create_method("sage-x", budget=3.0)
    quantized = quantize_model(model, method, tiny.tokens(8))
    bits = [layer.payload_bits for layer in quantized.layers]
    assert max(bits) - min(bits) > 0.5
    even = create_method("sage-x", budget=3.0, without=["allocation"])
    bits = [layer.payload_bits for layer in quantize_model(tiny.build("llama"), even, tiny.tokens(8)).layers]
    assert max(bits) - min(bits) < 0.15
