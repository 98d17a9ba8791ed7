"""Exports in the GPTQ format, read by GPTQModel; version 1 with zero points it accepts from its own exporter only."""

import pytest
import torch

gptqmodel = pytest.importorskip("gptqmodel")

CASES = ["rtn-2", "rtn-3", "rtn-4", "rtn-8", "rtn-4-symmetric", "rtn-4-rows", "gptq-3", "gptq-4-act-order", "awq-4"]


@pytest.mark.parametrize(("name", "format"), [*((name, "gptq_v2") for name in CASES), ("rtn-4-symmetric", "gptq")])
def test_gptqmodel_decodes_our_weights_and_gives_our_logits(case, name, format):
    made = case(name, format)
    loaded = gptqmodel.GPTQModel.load(
        str(made.folder), device="cpu", backend=gptqmodel.BACKEND.TORCH, dtype=torch.float16
    )
    modules = dict(loaded.model.named_modules())
    layers = [key.removeprefix("weight.") for key in made.expected if key.startswith("weight.")]
    for layer in layers:
        decoded = modules[layer].dequantize_weight().T  # theirs is [in_features, out_features]
        assert torch.equal(decoded.half(), made.weight(layer)), layer
    with torch.inference_mode():
        made.check_logits(loaded.model(input_ids=made.tokens).logits)
