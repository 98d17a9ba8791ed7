import pytest
import tiny
import torch

from harness.models import placement
from harness.models.blocks import find_blocks
from harness.models.placement import OneBlockAtATime, Placement, place
from harness.quantize import quantize_model
from methods import create_method

HOME, DEVICE = torch.device("cpu"), torch.device("meta")


class Moves:
    """Stands in for a device: notes where each block was sent, and leaves the weights where they are."""

    def __init__(self, monkeypatch, blocks):
        self.where = {id(block): HOME for block in blocks}
        self.most = 0

        def to(module, device):
            if id(module) in self.where:
                self.where[id(module)] = device
                self.most = max(self.most, sum(where == DEVICE for where in self.where.values()))
            return module

        monkeypatch.setattr(torch.nn.Module, "to", to)


@pytest.fixture
def model():
    return tiny.build()


@pytest.fixture
def moves(monkeypatch, model):
    return Moves(monkeypatch, find_blocks(model).blocks)


def test_one_block_is_on_the_device_while_a_model_runs(model, moves):
    expected = tiny.build()(tiny.tokens()).logits
    OneBlockAtATime(find_blocks(model).blocks, DEVICE, HOME)
    assert torch.equal(model(tiny.tokens()).logits, expected)
    assert moves.most == 1


@pytest.mark.parametrize(("method", "options"), [("gptq", {"bits": 4}), ("awq", {"bits": 4}), ("rtn", {"bits": 4})])
def test_one_block_is_on_the_device_while_it_is_quantized(model, moves, method, options):
    blocks = find_blocks(model).blocks
    keeper = OneBlockAtATime(blocks, DEVICE, HOME)
    quantized = create_method(method, group_size=32, **options)
    seen = []

    def watch(done, total, what):
        if what not in ("planning", "done"):
            seen.append([moves.where[id(block)] == DEVICE for block in blocks].index(True))

    quantize_model(model, quantized, tiny.tokens(), watch, placement=keeper)
    assert moves.most == 1
    assert sorted(set(seen)) == list(range(len(blocks)))


def test_the_block_that_ran_last_goes_back_home(model, moves):
    first, second, *_ = find_blocks(model).blocks
    keeper = OneBlockAtATime([first, second], DEVICE, HOME)
    keeper.bring(first)
    keeper.bring(second)
    assert (moves.where[id(first)], moves.where[id(second)]) == (HOME, DEVICE)


def test_a_model_that_fits_is_moved_whole(model):
    assert type(place(model, torch.device("cpu"))) is Placement


def test_a_model_that_does_not_fit_leaves_its_blocks_at_home(model, monkeypatch):
    monkeypatch.setattr(placement, "available_memory", lambda device: placement._bytes(model))
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: moved.append(tensor.data_ptr()) or tensor)
    assert isinstance(place(model, DEVICE), OneBlockAtATime)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    found = {name for name, tensor in tensors.items() if tensor.data_ptr() in moved}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.rotary_emb.inv_freq"} <= found
    assert not [name for name in found if ".layers." in name]
