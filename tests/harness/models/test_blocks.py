import pytest
import tiny
from torch import nn

from harness.models.blocks import block_linears, find_blocks, model_linears
from kernels.errors import InputError

GATED = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
EXPECTED = {
    "llama": ("model.layers", GATED),
    "qwen2": ("model.layers", GATED),
    "gemma2": ("model.layers", GATED),
    "gemma3": ("model.layers", GATED),
    "opt": ("model.decoder.layers", {*(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")), "fc1", "fc2"}),
    "neox": (
        "gpt_neox.layers",
        {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    ),
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_decoder_blocks_and_their_linears_are_found(family):
    model = tiny.build(family)
    blocks = find_blocks(model)
    prefix, linears = EXPECTED[family]
    assert blocks.prefix == prefix
    assert blocks.blocks == tuple(model.get_submodule(prefix))
    assert all(set(block_linears(block)) == linears for block in blocks.blocks)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_model_linears_are_named_as_in_the_model_and_leave_the_head_out(family):
    model = tiny.build(family)
    found = model_linears(model)
    assert len(found) == tiny.LAYERS * len(EXPECTED[family][1])
    assert all(model.get_submodule(name) is linear for name, linear in found.items())
    assert not any(linear is model.get_output_embeddings() for linear in found.values())


def test_subclasses_of_linear_are_left_alone():
    class Special(nn.Linear):
        pass

    block = nn.ModuleDict({"plain": nn.Linear(4, 4), "special": Special(4, 4)})
    assert list(block_linears(block)) == ["plain"]


def test_the_largest_list_is_taken_and_the_outer_one_of_two_equals():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.adapters = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(8))
            self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(16, 16)]) for _ in range(1))

    assert find_blocks(Model()).prefix == "blocks"


def test_a_list_of_different_modules_is_no_list_of_blocks():
    model = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.ModuleDict({"a": nn.Linear(4, 4)})])
    with pytest.raises(InputError, match="ModuleList has no list of decoder blocks"):
        find_blocks(model)
