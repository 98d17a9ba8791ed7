import copy

import pytest
import tiny
import torch

from harness.calibration import BlockStream, check_sample_size
from harness.models.blocks import block_linears, find_blocks, model_linears
from harness.quantize import quantize_model
from kernels.errors import InputError, NumericalError
from methods import LayerStatistics, create_method

SHARED = {
    "llama": [{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, {"mlp.gate_proj", "mlp.up_proj"}],
    "opt": [{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}],
    # Both branches of a parallel block read the same tensor only where they share a norm; these do not.
    "neox": [],
}


def stream_of(model, ids):
    return BlockStream(model, find_blocks(model), ids)


def block_outputs(model, ids):
    """What each block gives in ordinary forward passes: one [samples, tokens, hidden] a block."""
    seen = [[] for _ in find_blocks(model).blocks]
    handles = []
    for outputs, block in zip(seen, find_blocks(model).blocks, strict=True):

        def keep(module, args, output, outputs=outputs):
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handles.append(block.register_forward_hook(keep))
    for window in ids:
        model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(outputs) for outputs in seen]


def layer_inputs(model, ids):
    """The inputs of every linear layer in ordinary forward passes: [samples, tokens, in_features] by name."""
    seen = {name: [] for name in model_linears(model)}
    handles = [
        # Some families flatten samples and tokens in front of their MLP.
        linear.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].view(1, len(ids[0]), -1)))
        for name, linear in model_linears(model).items()
    ]
    for window in ids:
        model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_streamed_activations_equal_the_model_s_own_hidden_states(family):
    model, ids = tiny.build(family), tiny.tokens()
    states = [
        torch.cat(states)
        for states in zip(*(model(w[None], output_hidden_states=True).hidden_states for w in ids), strict=True)
    ]
    outputs = block_outputs(model, ids)
    stream = stream_of(model, ids)
    for index, expected in enumerate(outputs):
        torch.testing.assert_close(stream.hidden, states[index], rtol=0, atol=1e-6)
        stream.advance(index)
        torch.testing.assert_close(stream.hidden, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_blocks_of_alternating_kinds_need_arguments_of_their_own(family):
    """If this fails, the test above cannot tell whether each block is replayed with its own mask and rotary angles."""
    model, ids = tiny.build(family), tiny.tokens()
    right, wrong = stream_of(model, ids), stream_of(model, ids)
    wrong._arguments = [wrong._arguments[0]] * tiny.LAYERS
    for index in range(2):
        right.advance(index)
        wrong.advance(index)
    assert float((right.hidden - wrong.hidden).abs().max()) > 1e-2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_hessians_equal_those_of_ordinary_forward_passes(family):
    model, ids = tiny.build(family), tiny.tokens()
    inputs = layer_inputs(model, ids)
    blocks, stream = find_blocks(model), stream_of(model, ids)
    for index in range(tiny.LAYERS):
        statistics = stream.collect(index, "hessian")
        assert statistics.keys() == block_linears(blocks.blocks[index]).keys()
        for name, found in statistics.items():
            x = inputs[blocks.name(index, name)].double()
            expected = 2 / len(ids) * torch.einsum("sti,stj->ij", x, x)
            scale = float(expected.diagonal().mean())
            torch.testing.assert_close(found.hessian.double() / scale, expected / scale, rtol=1e-5, atol=1e-5)
            assert (found.samples, found.tokens, found.inputs) == (len(ids), ids.numel(), None)
        stream.advance(index)


def test_inputs_are_kept_only_where_they_are_asked_for():
    model, ids = tiny.build(), tiny.tokens()
    statistics = stream_of(model, ids).collect(0, "inputs")
    expected = layer_inputs(model, ids)
    for name, found in statistics.items():
        torch.testing.assert_close(found.inputs, expected[f"model.layers.0.{name}"])


@pytest.mark.parametrize("family", SHARED)
def test_layers_that_read_the_same_tensor_share_their_statistics(family):
    model = tiny.build(family)
    statistics = stream_of(model, tiny.tokens()).collect(0, "hessian")
    groups = {}
    for name, found in statistics.items():
        groups.setdefault(id(found), set()).add(name)
    assert sorted(map(sorted, (g for g in groups.values() if len(g) > 1))) == sorted(map(sorted, SHARED[family]))


def test_collecting_leaves_a_block_before_its_last_layer_runs_and_no_hook_behind():
    model, ids = tiny.build(), tiny.tokens()
    ran = []
    linears = block_linears(find_blocks(model).blocks[0])
    for name, linear in linears.items():
        linear.register_forward_hook(lambda module, args, output, name=name: ran.append(name))
    stream = stream_of(model, ids)
    ran.clear()
    statistics = stream.collect(0, "hessian")
    assert statistics.keys() == linears.keys()
    assert "mlp.down_proj" not in ran
    assert ran.count("mlp.up_proj") == len(ids)
    assert not any(linear._forward_pre_hooks for linear in linears.values())


def test_collecting_does_not_change_the_activations():
    model, ids = tiny.build(), tiny.tokens()
    stream = stream_of(model, ids)
    before = stream.hidden.clone()
    stream.collect(0, "hessian")
    assert torch.equal(stream.hidden, before)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_later_blocks_see_the_quantized_blocks_before_them_and_their_own_weights_unquantized(family):
    model, ids = tiny.build(family), tiny.tokens(8)
    gptq = create_method("gptq", bits=2, group_size=32)
    manual = copy.deepcopy(model)
    blocks = find_blocks(manual)
    for index, block in enumerate(blocks.blocks):
        # Ordinary forward passes through the model as it is now: blocks before this one are quantized already.
        inputs = layer_inputs(manual, ids)
        for name, linear in block_linears(block).items():
            x = inputs[blocks.name(index, name)]
            statistics = LayerStatistics.from_inputs(x)
            linear.weight.copy_(gptq.quantize_linear(linear.weight, statistics).decode())
    quantize_model(model, gptq, ids)
    expected = model_linears(manual)
    for name, linear in model_linears(model).items():
        # Rounding in another order may flip a code here and there, and the flips feed back; other inputs flip most.
        different = (linear.weight - expected[name].weight).abs() > 1e-3
        assert float(different.float().mean()) < 0.02, name


def test_unquantized_inputs_would_give_other_weights():
    """If this fails, the test above cannot tell in front of which weights the Hessians were collected."""
    model, ids = tiny.build(), tiny.tokens(8)
    gptq = create_method("gptq", bits=2, group_size=32)
    untouched = layer_inputs(model, ids)
    name = f"model.layers.{tiny.LAYERS - 1}.mlp.down_proj"
    linear = model.get_submodule(name)
    alone = gptq.quantize_linear(linear.weight, LayerStatistics.from_inputs(untouched[name])).decode()
    quantize_model(model, gptq, ids)
    assert float(((linear.weight - alone).abs() > 1e-3).float().mean()) > 0.1


def test_overflowing_activations_name_the_layer():
    model = tiny.build()
    model.get_submodule("model.layers.0.mlp.up_proj").weight.fill_(float("inf"))
    stream = stream_of(model, tiny.tokens())
    with pytest.raises(NumericalError, match=r"layer mlp\.down_proj: calibration activations overflow"):
        stream.collect(0, "hessian")


def test_a_layer_that_is_never_reached_is_named():
    model = tiny.build()
    block = find_blocks(model).blocks[0]
    block.spare = torch.nn.Linear(4, 4)
    with pytest.raises(InputError, match="layer spare received no calibration tokens"):
        stream_of(model, tiny.tokens()).collect(0, "hessian")


def test_the_sample_size_check_says_how_many_samples_would_do():
    check_sample_size(samples=3, context=32, widest=96)
    with pytest.raises(InputError) as caught:
        check_sample_size(samples=2, context=32, widest=97)
    message = str(caught.value)
    assert "2 x 32 = 64 tokens for a Hessian of 97 inputs" in message
    assert message.endswith("use --calibration-samples 4 or more")
