"""Files for the peers' libraries: made beforehand by make_files.py, found below SAGEBENCH_PEERS. No project import."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """An exported model, and what it must compute."""

    folder: Path
    expected: dict[str, Tensor]

    @property
    def tokens(self) -> Tensor:
        return self.expected["tokens"]

    def check_logits(self, logits: Tensor) -> None:
        """No further from float32 than twice what our own model in float16 is."""
        exact = self.expected["logits.float32"]
        dtype_noise = (self.expected["logits.float16"] - exact).abs().max()
        assert (logits.float().cpu() - exact).abs().max() <= 2 * dtype_noise

    def weight(self, layer: str) -> Tensor:
        """The decoded weight of `layer` in float16: [out_features, in_features]."""
        return self.expected[f"weight.{layer}"]


@pytest.fixture
def case() -> Callable[[str, str], Case]:
    """A case in a format: `case("rtn-4", "gptq")`."""
    folder = os.environ.get("SAGEBENCH_PEERS")
    if not folder:
        pytest.skip("SAGEBENCH_PEERS is not set; see tox -e peers")

    def load(name: str, format: str) -> Case:
        root = Path(folder) / name
        return Case(root / format, load_file(root / "expected.safetensors"))

    return load


@pytest.fixture(autouse=True)
def few_threads() -> None:
    torch.set_num_threads(2)
