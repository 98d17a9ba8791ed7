"""The first decoder block of SmolLM2-135M as its methods see it: seven matrices, and the inputs of a sample text.

All 30 blocks have these shapes, so times add up to 1/30 of what the 210 matrices of the model take.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from harness.calibration import BlockStream
from harness.corpora import calibration_windows, load_text
from harness.models.blocks import find_blocks
from harness.models.load import load_model
from methods import LayerStatistics

DAMPING = 0.01  # the default of all methods here
# More tokens than the widest layer has inputs, so that its Hessian is not singular.
SAMPLES, CONTEXT = 4, 1024


@dataclass(frozen=True)
class Matrix:
    """One linear layer. kind: its shape as text, which layers of one shape share."""

    name: str
    weight: Tensor
    statistics: LayerStatistics

    @property
    def kind(self) -> str:
        return "{} x {}".format(*self.weight.shape)


def first_block() -> list[Matrix]:
    """The matrices in the order of the block; factors of the Hessians are there already, so that they are in no one's
    time: all methods share and keep them."""
    loaded = load_model("smollm2-135m")
    windows = calibration_windows(load_text("wiki-sample", "train"), loaded.tokenizer, SAMPLES, CONTEXT, seed=0)
    stream = BlockStream(loaded.model, find_blocks(loaded.model), windows)
    statistics = stream.collect(0, "hessian")
    for layer in statistics.values():
        layer.inverse_factor(DAMPING)
    return [Matrix(name, linear.weight, statistics[name]) for name, linear in stream.view(0).linears.items()]
