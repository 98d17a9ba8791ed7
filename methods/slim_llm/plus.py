"""SliM-LLM+: the group widths of SliM-LLM, and clipping of each group's range learned by gradient, block by block.

Per (row, group) two logits scale the ends of the range; rounding passes gradients straight through. A block's clipping
is learned so that its output on activations from quantized blocks comes near the unquantized model's; no error is
compensated. The widths are chosen by SliM-LLM's rule on those same activations; the released code reads them from the
file of a SliM-LLM run. Source: Huang et al. 2024, arXiv 2405.14917 (SliM-LLM+), on OmniQuant's learnable weight
clipping (Shao et al. 2023, arXiv 2308.13137); Aaronhuang-778/SliM-LLM cfdf5ff.

`faithful` has the released code's gradients, which end at the rounding of the zero point, and its one-bit groups, which
start with 1.48 times their scale and never get their mean back. By default gradients pass through the zero point, too,
and one-bit groups start at their scale and keep their mean. Ranges hold zero here in any case: a zero point is stored
as a code; the released code leaves those of groups of one sign where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor

from kernels.layouts import MixedWeight, PackedWeight
from methods.base import LayerContext, Needs, Provenance
from methods.block import BlockResult, BlockView
from methods.grids import resolve_group_size
from methods.rounding import store, store_scale
from methods.slim_llm.method import GroupWidthConfig, GroupWidthMethod
from methods.statistics import LayerStatistics

_FIRST_LOGIT = 4.0  # sigmoid 0.982: nearly the whole range


class SlimLlmPlusConfig(GroupWidthConfig):
    epochs: int = Field(50, ge=1, description="passes over the calibration samples for each block")
    learning_rate: float = Field(0.01, gt=0, description="of AdamW, without weight decay")
    augmented_loss: bool = Field(
        True, description="also come near the unquantized block's output on the same activations (scripts for LLaMA)"
    )


class SlimLlmPlus(GroupWidthMethod):
    """See the module."""

    Config = SlimLlmPlusConfig
    config: SlimLlmPlusConfig
    provenance = Provenance(
        paper="arXiv 2405.14917", code="Aaronhuang-778/SliM-LLM cfdf5ff", parity="not tested: no golden vectors"
    )
    stream = "both"

    @property
    def needs(self) -> Needs:
        return "block"

    def training_epochs(self, tokens: int) -> float:
        return self.config.epochs

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        """Clipping learned on this layer's own squared output error, a step an epoch: it has no block around it."""
        prepared, context = self._prepare(weight, context)
        statistics = self._statistics(statistics, prepared, context)
        clipped = self._clipped(prepared, statistics, context)
        hessian = statistics.hessian

        def losses() -> Iterator[Tensor]:
            change = clipped.rounded() - prepared
            yield ((change @ hessian) * change).sum() / hessian.diagonal().mean().clamp(min=1e-12)

        self._learn([clipped.logits], losses)
        return clipped.pack()

    def quantize_block(self, view: BlockView, contexts: Mapping[str, LayerContext]) -> BlockResult:
        assert view.collect is not None and view.targets is not None
        statistics = view.collect("inputs" if self.config.objective == "kl" else "hessian")
        hessians = {name: seen.hessian for name, seen in statistics.items()}
        layers = {}
        for name, linear in view.linears.items():
            weight, context = self._prepare(linear.weight, contexts[name])
            layers[name] = self._clipped(weight, self._statistics(statistics.pop(name), weight, context), context)
        dtype = next(view.block.parameters()).dtype
        beside = [view.run(sample) for sample in range(view.hidden.shape[0])] if self.config.augmented_loss else []

        def losses() -> Iterator[Tensor]:
            assert view.targets is not None
            for sample in range(view.hidden.shape[0]):
                weights = {f"{name}.weight": layer.rounded().to(dtype) for name, layer in layers.items()}
                output = view.forward(view.hidden[sample : sample + 1], weights).float()
                loss = (output - view.targets[sample : sample + 1].to(output)).square().mean()
                if beside:
                    loss = loss + (output - beside[sample].float()).square().mean()
                yield loss

        before, after = self._learn([layer.logits for layer in layers.values()], losses)
        for context in contexts.values():
            context.facts["block_loss"] = {"first_epoch": before, "last_epoch": after}
        return BlockResult({name: layer.pack() for name, layer in layers.items()}, hessians=hessians)

    def _clipped(self, weight: Tensor, statistics: LayerStatistics, context: LayerContext) -> _ClippedWeight:
        group_size = resolve_group_size(self.config.group_size, weight.shape[1])
        widths, _ = self.choose_widths(weight, statistics, group_size, context)
        return _ClippedWeight(weight, widths, group_size, self.scale_dtype, faithful=self.config.faithful)

    def _learn(self, logits: list[Tensor], losses: Callable[[], Iterator[Tensor]]) -> tuple[float, float]:
        """AdamW on `logits`, a step for each loss; the sum of the first and of the last epoch's losses."""
        optimizer = torch.optim.AdamW(logits, lr=self.config.learning_rate, weight_decay=0.0)
        epochs = []
        with torch.enable_grad():
            for _ in range(self.config.epochs):
                total = 0.0
                for loss in losses():
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += float(loss.detach())
                epochs.append(total)
        return epochs[0], epochs[-1]


class _ClippedWeight:
    """A weight [m, n] whose groups have ends that can be learned; all groups of one width are handled at once."""

    def __init__(
        self, weight: Tensor, widths: list[int], group_size: int, scale_dtype: torch.dtype, *, faithful: bool
    ) -> None:
        self._weight, self._widths, self._group_size = weight, widths, group_size
        self._scale_dtype, self._faithful = scale_dtype, faithful
        shape = (2, weight.shape[0], len(widths))
        # What is learned: for the upper and the lower end of each row's groups.
        self.logits = torch.full(shape, _FIRST_LOGIT, device=weight.device, requires_grad=True)
        self._of_column = torch.arange(weight.shape[1], device=weight.device) // group_size
        self._bits = torch.tensor(widths, device=weight.device)
        parts = weight.split(group_size, dim=1)
        low = torch.cat([part.amin(dim=1, keepdim=True).clamp(max=0) for part in parts], dim=1)
        high = torch.cat([part.amax(dim=1, keepdim=True).clamp(min=0) for part in parts], dim=1)
        empty = (low == 0) & (high == 0)
        self._low, self._high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
        self._mean = torch.cat([part.mean(dim=1, keepdim=True) for part in parts], dim=1)
        around = torch.zeros_like(self._mean) if faithful else self._mean
        spread = (weight - around[:, self._of_column]).abs()
        self._deviation = torch.cat([part.mean(dim=1, keepdim=True) for part in spread.split(group_size, dim=1)], dim=1)

    def rounded(self) -> Tensor:
        """The dequantized weight [m, n], float32; gradients pass through to the logits."""
        scale, zero, mean, sign_scale = (part[:, self._of_column] for part in self._constants())
        top = ((1 << self._bits) - 1)[self._of_column].float()
        codes = torch.minimum((_round(self._weight / scale) + zero).clamp(min=0), top)
        uniform = (codes - zero) * scale
        sign = torch.where(self._weight < self._mean[:, self._of_column], -1.0, 1.0)
        return torch.where(self._bits[self._of_column] == 1, mean + sign_scale * sign, uniform)

    def pack(self) -> MixedWeight:
        """The weight rounded to the learned grids, whose constants are rounded as they are stored."""
        with torch.no_grad():
            scale, zero, mean, sign_scale = self._constants()
        one_bit = self._bits == 1
        stored = store(sign_scale, self._scale_dtype), store_scale(scale, self._scale_dtype)
        scale = torch.where(one_bit, *stored)
        top = (1 << self._bits) - 1
        zero = torch.minimum(zero.clamp(min=0), top.float())
        of = self._of_column
        codes = torch.round(self._weight / scale.float()[:, of]).add_(zero[:, of]).clamp_(min=0)
        codes = torch.minimum(codes, top[of].float())
        codes = torch.where(one_bit[of], (self._weight >= self._mean[:, of]).float(), codes)
        return MixedWeight.pack(
            codes.to(torch.uint8),
            scale,
            zero.to(torch.uint8),
            store(mean, self._scale_dtype),
            widths=self._widths,
            group_size=self._group_size,
        )

    def _constants(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale, zero point, and for one-bit groups mean and scale: each [m, G]."""
        upper, lower = torch.sigmoid(self.logits)
        high, low = upper * self._high, lower * self._low
        scale = (high - low) / ((1 << self._bits) - 1)
        zero = (torch.round if self._faithful else _round)(-low / scale)
        factor = upper + 0.5
        if self._faithful:
            return scale, zero, torch.zeros_like(self._mean), self._deviation * factor
        return scale, zero, self._mean, self._deviation * factor / (torch.sigmoid(torch.tensor(_FIRST_LOGIT)) + 0.5)


def _round(values: Tensor) -> Tensor:
    """Half to even; the gradient passes straight through."""
    return values + (torch.round(values) - values).detach()
