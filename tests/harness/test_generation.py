"""Calibration text that the model writes itself."""

import tiny
import torch

from harness import generation
from harness.generation import sample_windows


def test_windows_have_the_shape_asked_for_whatever_the_length_of_a_piece(monkeypatch):
    model = tiny.build()
    monkeypatch.setattr(generation, "PIECE", 10)
    windows = sample_windows(model, samples=3, context=24, seed=0)
    assert windows.shape == (3, 24)
    assert windows.dtype == torch.int64
    assert int(windows.min()) >= 0 and int(windows.max()) < tiny.VOCABULARY


def test_sampling_is_seeded():
    model = tiny.build()
    first, again, other = (sample_windows(model, 2, 16, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tokens_are_drawn_from_the_model_s_own_predictions():
    """The model finds its own text likelier than random tokens, by about the gap between entropy and cross-entropy."""
    model = tiny.build()
    windows = sample_windows(model, samples=16, context=32, seed=0)

    def loss(ids):
        return float(torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    def entropy(ids):
        predicted = model(ids).logits[:, :-1].log_softmax(-1)
        return float(-(predicted.exp() * predicted).sum(-1).mean())

    assert abs(loss(windows) - entropy(windows)) < 0.2
    assert loss(windows) < loss(tiny.tokens(16)) - 0.5
