"""Exports in the GPTQ format, read by GPTQModel."""

import pytest
import torch

gptqmodel = pytest.importorskip("gptqmodel")

CASES = ["rtn-2", "rtn-3", "rtn-4", "rtn-8", "rtn-4-symmetric", "rtn-4-rows", "gptq-3", "gptq-4-act-order", "awq-4"]


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("name", CASES)
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
