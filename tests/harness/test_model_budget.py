"""A budget for the whole model: methods that plan over all layers."""

import pytest
import tiny

from harness.ledger import build_ledger
from harness.quantize import quantize_model
from methods import create_method


@pytest.mark.parametrize("options", [{"budget": 3.0}, {"budget": 3.0, "mode": "weights-only"}])
def test_a_whole_model_is_within_its_budget(options):
    model = tiny.build("llama")
    quantized = quantize_model(model, create_method("sage-x", **options), tiny.tokens(8))
    ledger = build_ledger(model, quantized, None)
    assert 2.9 < ledger["payload_bits"] <= 3.0
    assert ledger["nominal_weight_bits"] + ledger["nominal_scale_bits"] == pytest.approx(ledger["payload_bits"])


def test_budgets_differ_between_layers_by_their_sensitivity():
    model = tiny.build("llama")
    method = create_method("sage-x", budget=3.0)
    quantized = quantize_model(model, method, tiny.tokens(8))
    bits = [layer.payload_bits for layer in quantized.layers]
    assert max(bits) - min(bits) > 0.5
    even = create_method("sage-x", budget=3.0, without=["allocation"])
    bits = [layer.payload_bits for layer in quantize_model(tiny.build("llama"), even, tiny.tokens(8)).layers]
    assert max(bits) - min(bits) < 0.15
