import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTJConfig

from harness.calibration import BlockStream
from harness.models.arguments import block_arguments
from harness.models.blocks import block_linears, find_blocks
from kernels.errors import InputError


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_they_are_those_of_an_ordinary_pass_and_the_first_block_alone_computes(family):
    model, ids = tiny.build(family), tiny.tokens(samples=1)
    blocks = find_blocks(model)
    expected, computed = [], []
    handles = [
        block.register_forward_pre_hook(lambda _, args, kwargs: expected.append((args, kwargs)), with_kwargs=True)
        for block in blocks.blocks
    ]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    for index, block in enumerate(blocks.blocks):
        for linear in block_linears(block).values():
            linear.register_forward_hook(lambda *_, index=index: computed.append(index))
    found = block_arguments(model, blocks, ids)
    assert set(computed) == {0}
    assert find_blocks(model) == blocks
    for (positional, named), (args, kwargs) in zip(found, expected, strict=True):
        kwargs.pop("hidden_states", None)
        assert len(positional) == max(0, len(args) - 1)
        assert named.keys() == kwargs.keys()
        for name, value in named.items():
            wanted = kwargs[name]
            for one, other in zip(*(v if isinstance(v, tuple) else (v,) for v in (value, wanted)), strict=True):
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_blocks_may_give_tuples():
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=64, n_positions=64, n_embd=32, n_layer=3, n_head=2, rotary_dim=8)
    model = AutoModelForCausalLM.from_config(config).eval()
    blocks, ids, outputs = find_blocks(model), torch.randint(64, (2, 16)), []
    handle = blocks.blocks[-1].register_forward_hook(lambda _, args, output: outputs.append(output))
    with torch.no_grad():
        for window in ids:
            model(window[None], use_cache=False)
    handle.remove()
    assert all(isinstance(output, tuple) for output in outputs)
    stream = BlockStream(model, blocks, ids)
    for index in range(3):
        stream.advance(index)
    torch.testing.assert_close(stream.hidden, torch.cat([output[0] for output in outputs]), rtol=0, atol=1e-6)


class Attached(nn.Module):
    """A block that is handed more than the hidden state."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states, more=None):
        return self.linear(hidden_states)


class Tied(nn.Module):
    """A model that hands its blocks something of the text, or of the block before, or runs them out of order."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Attached() for _ in range(3))

    def forward(self, ids, use_cache=False):
        hidden = self.embed(ids)
        mask, text = torch.ones(ids.shape[1], ids.shape[1]).tril(), self.embed(ids)
        for index, layer in enumerate(self.layers):
            more = {
                "mask": mask,
                "text": {"a": mask, "b": [text]} if index else {"a": mask, "b": [mask]},
                "earlier": hidden if index > 1 else None,
                "skipped": mask,
            }[self.how]
            if self.how != "skipped" or index != 1:
                hidden = layer(hidden, more=more)
        return hidden


def test_what_depends_on_the_text_is_refused_by_name():
    ids = torch.arange(10)[None]
    for how, said in (("text", r"Tied hands block 1 more\.b\.0, which"), ("earlier", "Tied hands block 2 more, which")):
        model = Tied(how)
        before = find_blocks(model)
        with pytest.raises(InputError, match=said):
            block_arguments(model, before, ids)
        assert find_blocks(model) == before
    model = Tied("mask")
    assert len(BlockStream(model, find_blocks(model), ids).view(2).run(0)) == 1


def test_a_model_that_does_not_run_all_blocks_is_refused():
    model = Tied("skipped")
    with pytest.raises(InputError, match="Tied ran 2 decoder blocks of 3 in one forward pass"):
        block_arguments(model, find_blocks(model), torch.arange(10)[None])
