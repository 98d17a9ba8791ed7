"""Exports in the pack-quantized format, read by compressed-tensors through transformers."""

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("compressed_tensors", minversion="0.15")

CASES = ["rtn-2", "rtn-3", "rtn-4", "rtn-8", "rtn-4-symmetric", "rtn-4-rows", "gptq-3", "awq-4"]


@pytest.mark.parametrize("name", CASES)
def test_transformers_gives_our_logits(case, name):
    from transformers import AutoConfig, AutoModelForCausalLM

    made = case(name, "compressed-tensors")
    config = AutoConfig.from_pretrained(made.folder)
    # Decoded by compressed-tensors while loading: its layers on the meta device have no packed zero points (0.20.0).
    config.quantization_config["dequantize"] = True
    model = AutoModelForCausalLM.from_pretrained(made.folder, config=config, dtype=torch.float16)
    with torch.inference_mode():
        made.check_logits(model(made.tokens).logits)


def test_a_symmetric_model_stays_packed_in_transformers(case):
    from transformers import AutoModelForCausalLM

    made = case("rtn-4-symmetric", "compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float16)
    with torch.inference_mode():
        made.check_logits(model(made.tokens).logits)


@pytest.mark.parametrize("name", CASES)
def test_the_library_decodes_our_weights(case, name):
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoConfig

    made = case(name, "compressed-tensors")
    described = AutoConfig.from_pretrained(made.folder).quantization_config
    scheme = QuantizationConfig.model_validate(described).config_groups["group_0"]
    stored = load_file(made.folder / "model.safetensors")
    for key in made.expected:
        if key.startswith("weight."):
            layer = key.removeprefix("weight.")
            inside = {name.rpartition(".")[2]: stored[name] for name in stored if name.startswith(f"{layer}.")}
            decoded = PackedQuantizationCompressor.decompress(inside, scheme)["weight"]
            assert torch.equal(decoded, made.weight(layer)), layer
