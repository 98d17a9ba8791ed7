"""Exports in the GPTQ format, read by AutoGPTQ 0.7.1 (version 1 of the format only)."""

import pytest
import torch

auto_gptq = pytest.importorskip("auto_gptq")

CASES = ["rtn-2", "rtn-3", "rtn-4", "rtn-8", "rtn-4-symmetric", "rtn-4-rows", "gptq-3", "gptq-4-act-order", "awq-4"]


@pytest.mark.parametrize("name", CASES)
def test_autogptq_gives_our_logits(case, name):
    made = case(name, "gptq")
    loaded = auto_gptq.AutoGPTQForCausalLM.from_quantized(
        str(made.folder), device="cpu", use_safetensors=True, use_triton=False, disable_exllama=True,
        disable_exllamav2=True, inject_fused_attention=False, inject_fused_mlp=False,
    )  # fmt: skip
    model = loaded.model.float()  # half products are slow on a CPU; codes and scales stay what they are
    with torch.inference_mode():
        made.check_logits(model(input_ids=made.tokens).logits)
