"""On a CUDA device that is only pretended a layer packs, by every way through a method, to the bytes of the CPU.

The methods' defaults are tested on a model: tests/harness/test_on_a_device.py.
"""

import pytest
import torch

from methods import LayerStatistics, create_method, method_class

# Options that take other ways through the code than the defaults do, and methods that treat a layer alone otherwise.
WAYS = [
    *((name, {}) for name in ("aptq", "sage-x", "slim-llm-plus")),
    ("awq", {"symmetric": True, "group_size": 48}),
    ("binary", {"mean_removal": True, "compensation": "column"}),
    ("billm", {"metric": "magnitude", "faithful": False, "block_size": 32}),
    ("billm", {"search_on": "weight", "compensation": "column", "block_size": 32}),
    ("billm", {"compensation": "block-exact", "block_size": 32}),
    ("cmpq", {"average_bits": 2.5, "scale_dtype": "float32"}),
    ("gptq", {"act_order": True}),
    ("gptq", {"act_order": True, "static_groups": True}),
    ("gptq", {"faithful": True, "symmetric": True}),
    ("mg-ptq", {"allocator": "knapsack"}),
    ("mg-ptq", {"allocator": "diagonal"}),
    ("mg-ptq", {"allocator": "random"}),
    ("micromix", {"faithful": True}),
    ("pb-llm", {"metric": "magnitude"}),
    ("pb-llm", {"faithful": True}),
    ("sage-ptq", {"saliency": "hessian", "threshold": "fixed"}),
    ("sage-ptq", {"saliency": "none"}),
    ("sage-ptq", {"saliency": "printed", "quantiles": "printed"}),
    ("sage-x", {"mode": "weights-only"}),
    ("sage-x", {"without": ["rotation", "rates", "order", "feedback"]}),
    ("slim-llm", {"faithful": True, "salience_weight": 2.0}),
    ("slim-llm-plus", {"faithful": True, "objective": "mse"}),
]
# What would take long and is not what this is about.
SHORT = {"sage-ptq": {"group_count": 2}, "mg-ptq": {"steps": 3}, "slim-llm-plus": {"epochs": 2}}


def layer():
    """A weight, and inputs of which one never fires."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(32, 96, generator=generator)
    inputs = torch.randn(2, 96, 96, generator=generator)
    inputs[:, :, 5] = 0
    return weight, inputs


def packed(name, options, device):
    weight, inputs = layer()
    options = {**SHORT.get(name, {}), **options}
    if "group_size" in method_class(name).Config.model_fields:
        options = {"group_size": 16, **options}
    statistics = LayerStatistics.from_inputs(inputs.to(device))
    return create_method(name, **options).quantize_linear(weight.to(device), statistics)


@pytest.mark.parametrize(("name", "options"), WAYS, ids=str)
def test_a_layer_packs_to_the_same_bytes_on_a_device(name, options, pretended_cuda):
    here, x = packed(name, options, "cpu"), layer()[1]
    with pretended_cuda:
        there = packed(name, options, "cuda")
        assert all(tensor.is_cuda for tensor in there.tensors().values())
        decoded, rounded = there.decode(), there.round_inputs(x.to("cuda"))
    assert here.metadata() == there.metadata()
    assert all(torch.equal(tensor, there.tensors()[key]) for key, tensor in here.tensors().items())
    assert torch.equal(decoded, here.decode())
    assert torch.equal(rounded, here.round_inputs(x))
