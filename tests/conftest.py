"""Fixtures that several floors share."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from pretended_device import PretendedCuda, pretend
from safetensors.torch import load_file
from torch import Tensor

# Read when triton is first imported, by whichever library: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Processes that tests start share the cores with other tests: their threads are not to spin while they wait.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from methods import LayerStatistics


def _mend_interpreter() -> None:
    """Triton before 3.7 calls int() on arrays of one element when it interprets a loop, which NumPy 2.4 refuses."""
    try:
        if tuple(map(int, metadata.version("triton").split(".")[:2])) >= (3, 7):
            return
    except metadata.PackageNotFoundError:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = mended


_mend_interpreter()

_GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One golden vector: the layer, and what the authors' code made of it."""

    weight: Tensor
    statistics: LayerStatistics
    quantized: Tensor
    options: dict[str, Any]
    extra: dict[str, Any]
    sensitivity: float
    noise: float  # the largest change of an entry when H moves by 1e-6 of itself
    proxy_loss: float
    path: Path

    def statistics_with_inputs(self) -> LayerStatistics:
        """The stored Hessian, and the inputs that it was made from, drawn again by their recipe."""
        recipe = json.loads(self.path.with_name(f"input-{self.path.stem[-1]}.json").read_text(encoding="utf-8"))
        columns = recipe["shape"][1]
        torch.manual_seed(recipe["input_seed"])
        mix = 0.8 * torch.randn(columns, columns) / math.sqrt(columns) + 0.6 * torch.eye(columns)
        spread = torch.exp(0.5 * torch.randn(columns))
        x = (torch.randn(recipe["x_shape"]) @ mix) * spread
        if recipe["dead_column"] is not None:
            x[..., recipe["dead_column"]] = 0
        head = load_file(self.path.with_name(f"input-{self.path.stem[-1]}.safetensors"))["x_head"]
        # Products differ in their last bits between machines; another generator would draw something else altogether.
        assert torch.allclose(x[0, : len(head)], head, rtol=1e-4, atol=1e-4), "torch draws other numbers than it did"
        return LayerStatistics(self.statistics.hessian, self.statistics.samples, self.statistics.tokens, x)

    def mismatch(self, decoded: Tensor) -> float:
        """Share of entries that differ by more than 1e-5 relative."""
        far = (decoded - self.quantized).abs() > 1e-5 * self.quantized.abs() + 1e-9
        return float(far.float().mean())


@pytest.fixture
def golden() -> Callable[[str, int], Golden]:
    """Load a golden vector by case and layer: `golden("gptq4-g128", 0)`."""

    def load(case: str, layer: int) -> Golden:
        path = _GOLDEN / f"{case}-{layer}.json"
        described = json.loads(path.read_text(encoding="utf-8"))
        inputs = load_file(_GOLDEN / f"input-{layer}.safetensors")
        columns = inputs["w"].shape[1]
        hessian = torch.zeros(columns, columns)
        rows, cols = torch.tril_indices(columns, columns)
        hessian[rows, cols] = inputs["h_lower"]
        hessian[cols, rows] = inputs["h_lower"]
        sensitivity = described.get("sensitivity_to_1e6_relative_noise_in_H", {})
        return Golden(
            weight=inputs["w"],
            statistics=LayerStatistics.from_hessian(hessian, samples=128, tokens=128 * 64),
            quantized=load_file(path.with_suffix(".safetensors"))["q"],
            options=described["options"],
            extra=described.get("extra", {}),
            sensitivity=float(sensitivity.get("fraction_entries_changed", 0.0)),
            noise=float(sensitivity.get("max_abs", 0.0)),
            proxy_loss=float(described["proxy_loss"]),
            path=path,
        )

    return load


@pytest.fixture
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCuda]:
    """As if there were a CUDA device, while what this gives is entered: see pretended_device.py."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what a run sets is forgotten afterwards
    yield pretend(monkeypatch)
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled


# The same examples every time, however slowly a busy machine draws them; `--hypothesis-profile explore` draws new ones.
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", settings.get_profile("same"), derandomize=False)
settings.load_profile("same")


def pytest_configure() -> None:
    # Small matrices everywhere: more threads cost more than they bring, and results stay the same on any machine.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
