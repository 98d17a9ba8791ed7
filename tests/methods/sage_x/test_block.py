"""One block encoded group by group, with and without training in between."""

from dataclasses import replace

import pytest
import small_block
import torch

from methods import LayerContext, create_method
from methods.sage_x import tuning

TOKENS = 64  # of a sample of the small block


@pytest.fixture(autouse=True)
def _a_step_for_each_sample(monkeypatch):
    monkeypatch.setattr(tuning, "BATCH_TOKENS", TOKENS)


def encoded(noise=0.3, samples=8, **options):
    """The block after encoding: its view, the result, how far its outputs are from the unquantized block's, and the
    contexts."""
    view = small_block.view(samples, TOKENS, noise=noise)
    method = create_method("sage-x", **{"budget": 2.6, **options})
    contexts = {name: LayerContext(f"model.{name}") for name in view.linears}
    result = method.quantize_block(view, contexts)
    outputs = torch.cat([view.run(sample) for sample in range(len(view.hidden))])
    loss = float((outputs - view.targets).square().mean())
    return view, result, loss, contexts


def test_the_block_holds_what_was_stored():
    view, result, _, _ = encoded()
    assert list(result.packed) == list(view.linears)
    for name, packed in result.packed.items():
        assert torch.equal(view.linears[name].weight, packed.decode())
        assert packed.payload_bits() <= 2.6
        assert not torch.equal(result.targets[name], packed.decode())
    assert result.folded == ()


def test_what_stands_in_front_of_the_block_is_left_alone_and_its_weights_are_handed_back():
    view, result, _, _ = encoded()
    fresh = small_block.view()
    assert torch.equal(view.targets, fresh.targets)
    assert torch.equal(view.unquantized, fresh.unquantized)
    assert torch.equal(view.hidden, fresh.hidden)
    for name, linear in fresh.linears.items():
        assert torch.equal(result.targets[name], linear.weight)


def test_targets_that_make_good_earlier_errors_lower_the_loss():
    """With the same inputs in both models all errors are the block's own."""
    _, _, with_targets, _ = encoded(noise=0.0)
    _, _, without, _ = encoded(noise=0.0, without=["targets"])
    assert with_targets < 0.97 * without


def test_training_lowers_the_loss_and_says_what_it_changed():
    _, _, untrained, _ = encoded(noise=0.0, samples=32)
    view, result, trained, contexts = encoded(noise=0.0, samples=32, tuning="blocks")
    assert trained < 0.98 * untrained
    assert result.folded == ("norm.weight",)
    gain = view.block.norm.weight
    assert torch.equal(gain, gain.half().float())  # an unquantized parameter counts 16 bits
    assert not torch.equal(gain, torch.ones_like(gain))
    assert len(contexts["gate"].facts["held_out_loss_after_tuning"]) == 3
    for name, packed in result.packed.items():
        assert torch.equal(view.linears[name].weight, packed.decode())


def test_a_step_follows_the_mean_over_its_samples(monkeypatch):
    """Samples that are all alike teach as much in one batch as one of them alone."""
    view = small_block.view(8, TOKENS)
    alike = {part: getattr(view, part)[:1].repeat(8, 1, 1) for part in ("hidden", "targets", "unquantized")}
    monkeypatch.setattr(tuning, "EPOCHS", 1)
    found = []
    for count, tokens in ((8, 7 * TOKENS), (2, TOKENS)):  # one step each, on 7 samples and on 1
        monkeypatch.setattr(tuning, "BATCH_TOKENS", tokens)
        part = replace(small_block.view(8, TOKENS), **{name: tensor[:count].clone() for name, tensor in alike.items()})
        method = create_method("sage-x", budget=2.6, tuning="scales")
        result = method.quantize_block(part, {name: LayerContext(name) for name in part.linears})
        found.append(result.packed["down"].row_scales().float())
    untrained = create_method("sage-x", budget=2.6)
    plain = untrained.quantize_block(part, {name: LayerContext(name) for name in part.linears})
    assert torch.allclose(found[0], found[1], rtol=2e-3)
    assert not torch.allclose(found[0], plain.packed["down"].row_scales().float(), rtol=2e-3)


def test_training_scales_lowers_the_loss_and_leaves_the_codes():
    """All layers read what they read without training: of what is stored, only the row scales differ."""
    _, plain, untrained, _ = encoded(noise=0.0, samples=32)
    view, result, trained, contexts = encoded(noise=0.0, samples=32, tuning="scales")
    assert trained < 0.995 * untrained
    assert result.folded == ("norm.weight",)
    assert len(contexts["gate"].facts["held_out_loss_after_tuning"]) == 1
    for name, packed in result.packed.items():
        before, after = plain.packed[name].tensors(), packed.tensors()
        assert [part for part in after if not torch.equal(after[part], before[part])] == ["row_scales"]
        assert after["row_scales"].dtype == before["row_scales"].dtype
        assert torch.equal(view.linears[name].weight, packed.decode())


@pytest.mark.parametrize("kind", ["scales", "blocks"])
def test_training_is_the_same_every_time(kind):
    (_, first, *_), (_, second, *_) = encoded(tuning=kind), encoded(tuning=kind)
    for name in first.packed:
        assert torch.equal(first.packed[name].decode(), second.packed[name].decode())


@pytest.mark.parametrize(("tokens", "steps"), [(TOKENS - 1, 7), (TOKENS, 7), (3 * TOKENS, 3), (100 * TOKENS, 1)])
def test_a_step_takes_whole_samples_of_so_many_tokens(tokens, steps, monkeypatch):
    taken = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(tuning, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: taken.append(step(self)))
    encoded(tuning="scales")  # 8 samples, of which one is held out
    assert len(taken) == tuning.EPOCHS * steps


def test_a_single_sample_is_too_little_to_train_on():
    view = small_block.view(samples=1)
    method = create_method("sage-x", budget=2.6, tuning="blocks")
    contexts = {name: LayerContext(name) for name in view.linears}
    method.quantize_block(view, contexts)
    assert contexts["gate"].facts["held_out_loss_after_tuning"] == pytest.approx([1.0] * 3)
