"""Every method, interrupted between two blocks and begun again in a new process's place, gives the same bits."""

import pytest
import tiny
import torch

from harness.quantize import quantize_model
from harness.quantized_cache import QuantizedEntry
from methods import create_method
from methods.registry import builtin_method_names
from methods.sage_x import SageX


class Interrupted(QuantizedEntry):
    """Is interrupted once block 1 is kept."""

    def save(self, index, block, stream):
        kept = super().save(index, block, stream)
        if index == 1:
            raise KeyboardInterrupt
        return kept


@pytest.mark.parametrize("name", builtin_method_names())
def test_an_interrupted_method_goes_on_bit_for_bit(name, monkeypatch):
    monkeypatch.setattr(SageX, "sample_tokens", 8)  # shorter than the windows: it sees them cut

    def method():
        return create_method(name, **tiny.OPTIONS.get(name, {}))

    whole_model, resumed_model = tiny.build(), tiny.build()
    whole = quantize_model(whole_model, method(), tiny.tokens(8))
    with pytest.raises(KeyboardInterrupt):
        quantize_model(tiny.build(), method(), tiny.tokens(8), checkpoints=Interrupted("key"))
    entry = QuantizedEntry("key")
    resumed = quantize_model(resumed_model, method(), tiny.tokens(8), checkpoints=entry)
    assert entry.restored_blocks == 2
    assert list(resumed.packed) == list(whole.packed)
    for layer, packed in whole.packed.items():
        theirs = resumed.packed[layer].tensors()
        for key, tensor in packed.tensors().items():
            assert torch.equal(tensor, theirs[key]), (layer, key)
    assert resumed.folded.keys() == whole.folded.keys()
    assert all(torch.equal(tensor, whole.folded[key]) for key, tensor in resumed.folded.items())
    ids = tiny.tokens(seed=9)
    assert torch.equal(resumed_model(ids).logits, whole_model(ids).logits)
    drop = ("seconds",)
    for mine, theirs in zip(resumed.layers, whole.layers, strict=True):
        assert {k: v for k, v in mine.as_record().items() if k not in drop} == {
            k: v for k, v in theirs.as_record().items() if k not in drop
        }


def test_only_the_first_blocks_are_quantized_where_a_spec_says_so():
    from harness.ledger import build_ledger
    from harness.models.blocks import model_linears, quantize_only

    model, before = tiny.build(), tiny.build()
    quantize_only(model, 1)
    assert {name.split(".")[2] for name in model_linears(model)} == {"0"}
    quantized = quantize_model(model, create_method("gptq", bits=3, group_size=32), tiny.tokens(8))
    assert list(quantized.packed) == list(model_linears(model))
    for (name, mine), theirs in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, theirs) == (name.removesuffix(".weight") not in quantized.packed), name
    ledger = build_ledger(model, quantized, None)
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert ledger["other_bytes"] == 2 * (everything - ledger["weights"])
