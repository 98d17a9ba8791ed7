"""APTQ: GPTQ with a Hessian of the attention block's output, and 4 or 2 bits by layer.

A reconstruction: no code is public, and the abstract alone could be read. What it says: the Hessian of query, key and
value projections is that of the attention's output, its softmax included (Levenberg-Marquardt); the trace of a layer's
Hessian is its sensitivity; layers have 4 or 2 bits. What is ours: the attention Hessian is a Gauss-Newton one with a
weight for each token, c_t = E |d(output . r) / d(projection's output at t)|^2 over random r, estimated with one draw a
sample, H = sum c_t x_t x_t^T, scaled so that the mean weight is 1; layers are ranked by trace over number of weights,
in the unquantized model, and for all of them the trace is that of the plain X X^T.
Source: Guan et al. 2024, arXiv 2402.14866.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels.layouts import PackedWeight, UniformWeight
from methods.base import LayerContext, LayerSurvey, Needs, NominalBits, Provenance, QuantizationMethod
from methods.block import BlockResult, BlockView
from methods.gptq import Gptq, GptqConfig
from methods.grids import resolve_group_size
from methods.hessian import accumulate
from methods.second_order import CompensationConfig
from methods.statistics import LayerStatistics

_LOW, _HIGH = 2, 4
_ATTENTION = ("attn", "attention")


class AptqConfig(CompensationConfig):
    average_bits: float = Field(
        3.0, ge=_LOW, le=_HIGH, description="bits of a code on average over the model's weights; each layer has 2 or 4"
    )
    group_size: int = Field(128, ge=-1, description="input columns that share a scale; -1 for the whole row")


class Aptq(QuantizationMethod):
    """See the module."""

    Config = AptqConfig
    config: AptqConfig
    provenance = Provenance(
        paper="arXiv 2402.14866",
        code="no public code",
        parity="none possible: no public code",
        reconstruction=True,
        basis="the paper's abstract alone",
    )
    stream = "quantized"
    surveys = True

    @property
    def needs(self) -> Needs:
        return "block"

    def training_epochs(self, tokens: int) -> float:
        return 1  # the gradients of the attention's output

    def check_shape(self, out_features: int, in_features: int) -> None:
        resolve_group_size(self.config.group_size, in_features)

    def plan_model(self, survey: Mapping[str, LayerSurvey]) -> Mapping[str, Any]:
        """The bits of each layer: 4 by falling sensitivity, as long as the average allows it, else 2."""
        sizes = {name: layer.out_features * layer.in_features for name, layer in survey.items()}
        room = round((self.config.average_bits - _LOW) / (_HIGH - _LOW) * sum(sizes.values()))
        plan = dict.fromkeys(survey, _LOW)
        for name in sorted(survey, key=lambda name: survey[name].hessian_trace / sizes[name], reverse=True):
            if sizes[name] <= room:
                plan[name] = _HIGH
                room -= sizes[name]
        return plan

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        """GPTQ with the bits of the layer's plan; 4 for a layer without a model around it."""
        weight, context = self._prepare(weight, context)
        statistics = self._statistics(statistics, weight, context)
        options = self.config.model_dump(exclude={"average_bits"})
        bits = _HIGH if context.plan is None else context.plan
        return Gptq(GptqConfig(bits=bits, **options)).quantize_linear(weight, statistics, context)

    def quantize_block(self, view: BlockView, contexts: Mapping[str, LayerContext]) -> BlockResult:
        assert view.collect is not None
        statistics = view.collect("hessian")
        plain = {name: seen.hessian for name, seen in statistics.items()}
        for name, hessian in attention_hessians(view, self.config.seed).items():
            contexts[name].facts["hessian"] = "attention"
            statistics[name] = LayerStatistics.from_hessian(hessian, statistics[name].samples)
        packed = {
            name: self.quantize_linear(linear.weight, statistics[name], contexts[name])
            for name, linear in view.linears.items()
        }
        return BlockResult(packed, hessians=plain)

    def nominal_bits(self, packed: PackedWeight) -> NominalBits:
        """2 or 4 bits a code; how the paper counts more than that is not known."""
        assert isinstance(packed, UniformWeight) and packed.bits is not None
        return NominalBits(weight=float(packed.bits), scale=0.0)


def attention_hessians(view: BlockView, seed: int) -> dict[str, Tensor]:
    """Token-weighted Hessians [n, n] of the linear layers inside the block's attention module, by name.

    The layer that ends the module has the same weight for all tokens but for the draw: its Hessian is nearly the
    ordinary one.
    """
    modules = dict(view.block.named_modules())
    parents = {name: name.rpartition(".")[0] for name in view.linears}
    inside = {name: parent for name, parent in parents.items() if any(part in parent.lower() for part in _ATTENTION)}
    if not inside:
        return {}
    attention = modules[next(iter(inside.values())).split(".")[0]]
    generator = torch.Generator().manual_seed(seed)
    recorder = _Recorder({name: view.linears[name] for name in inside}, attention)
    hessians: dict[str, Tensor] = {}
    totals = dict.fromkeys(inside, 0.0)
    with recorder, torch.enable_grad():
        for sample in range(view.hidden.shape[0]):
            view.forward(view.hidden[sample : sample + 1].detach().requires_grad_(True), {})
            output = recorder.output
            draw = torch.randn(output.shape, generator=generator).to(output)
            gradients = torch.autograd.grad((output * draw).sum(), list(recorder.outputs.values()))
            for name, gradient in zip(recorder.outputs, gradients, strict=True):
                x, weights = recorder.inputs[name].float(), gradient.float().square().mean(dim=-1)
                # Samples are weighed against each other, too: one factor for all of them, at the end.
                totals[name] += float(weights.mean(dtype=torch.float64))
                x = (x * weights.sqrt().unsqueeze(-1)).reshape(-1, x.shape[-1])
                accumulate(hessians.setdefault(name, x.new_zeros(x.shape[1], x.shape[1])), x)
    return {name: hessian.mul_(2 / max(totals[name], 1e-30)) for name, hessian in hessians.items()}


class _Recorder:
    """Hooks that keep what the layers of an attention module read and give, and what the module gives."""

    def __init__(self, linears: Mapping[str, nn.Linear], attention: nn.Module) -> None:
        self._linears, self._attention = linears, attention
        self._handles: list[Any] = []
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.output = torch.empty(0)

    def __enter__(self) -> _Recorder:
        for name, linear in self._linears.items():
            hook = lambda _, args, out, name=name: self._see(name, args[0], out)  # noqa: E731
            self._handles.append(linear.register_forward_hook(hook))
        self._handles.append(self._attention.register_forward_hook(self._end))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, name: str, x: Tensor, out: Tensor) -> None:
        self.inputs[name], self.outputs[name] = x.detach(), out

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output[0] if isinstance(output, tuple) else output
