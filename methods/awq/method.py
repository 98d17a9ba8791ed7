"""AWQ's options and its three steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kernels.errors import NumericalError
from kernels.layouts import PackedWeight
from methods.awq.activations import Activations
from methods.awq.pairs import PAIRS, Pair, divide, foldable, unquantized
from methods.base import LayerContext, Needs, Provenance
from methods.block import BlockResult, BlockView
from methods.grids import GroupedCodes, resolve_group_size, round_to_groups
from methods.rtn import UniformConfig, UniformMethod, pack_groups
from methods.statistics import LayerStatistics

_RATIOS = tuple(k / 20 for k in range(20))
_CLIPS = tuple(1 - i / 20 for i in range(10))
_CLIP_TOKENS = 512
# Queries and keys are not clipped: their product is sensitive to outliers.
_UNCLIPPED = ("q_", "k_", "query", "key", "Wqkv")
# Folding must not change the block's function: the change of its output, relative to what the block adds to its input,
# above which a pair is left alone. Stored norm gains are rounded to `scale_dtype`, so the change is never exactly zero:
# a few units of that rounding are allowed.
_FOLD_ROUNDINGS = 3
_FOLD_TOLERANCE = 1e-3


class AwqConfig(UniformConfig):
    search_tokens: int = Field(
        65536,
        ge=0,
        description="tokens (whole samples) that both searches look at, the authors' 128 x 512; 0: all there are",
    )


class Awq(UniformMethod):
    """See the package."""

    Config = AwqConfig
    config: AwqConfig
    provenance = Provenance(
        paper="arXiv 2306.00978", code="mit-han-lab/llm-awq d6e797a", parity="not tested: no golden vectors"
    )

    @property
    def needs(self) -> Needs:
        return "block"

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        """Clipping and rounding alone: without the operation before it a layer's scales have nowhere to go."""
        prepared, context = self._prepare(weight, context)
        statistics = self._statistics(statistics, prepared, context)
        inputs = self._inputs(statistics, context).reshape(-1, statistics.in_features).float()
        return self._pack(self._clip(prepared, inputs, context))

    @torch.no_grad()
    def quantize_block(self, view: BlockView, contexts: Mapping[str, LayerContext]) -> BlockResult:
        seen = Activations(view, self._search_samples(view))
        folded: list[str] = []
        for pair in PAIRS:
            modules = dict(view.block.named_modules())
            if foldable(modules, pair):
                ratio = self._scale(view, pair, modules, seen)
                for reader in pair.readers:
                    contexts[reader].facts["ratio"] = ratio
                if ratio is not None:
                    folded += unquantized(pair, modules)
        packed, targets = {}, {}
        for name, linear in view.linears.items():
            weight, context = self._prepare(linear.weight, contexts[name])
            targets[name] = weight
            clipped = weight if _is_query_or_key(name) else self._clip(weight, seen.inputs(name), context)
            packed[name] = self._pack(clipped)
        return BlockResult(packed, targets, tuple(dict.fromkeys(folded)), seen.grams())

    def _search_samples(self, view: BlockView) -> int:
        samples, tokens = view.hidden.shape[:2]
        return samples if self.config.search_tokens == 0 else min(samples, -(-self.config.search_tokens // tokens))

    def _round(self, weight: Tensor, group_size: int) -> GroupedCodes:
        return round_to_groups(
            weight,
            self.config.bits,
            group_size,
            symmetric=self.config.symmetric,
            scale_dtype=self.scale_dtype,
            include_zero=False,
        )

    def _pack(self, weight: Tensor) -> PackedWeight:
        group_size = resolve_group_size(self.config.group_size, weight.shape[1])
        return pack_groups(self._round(weight, group_size), self.config)

    def _scale(self, view: BlockView, pair: Pair, modules: dict[str, Any], seen: Activations) -> float | None:
        """Search the exponent of one pair and fold the scales; returns the exponent.

        None: the block does not compute what the pair says, folding changed its output, and was undone.
        """
        readers = [modules[name] for name in pair.readers]
        original = [linear.weight.detach().clone() for linear in readers]
        magnitude = seen.inputs(pair.readers[0]).abs().mean(dim=0)
        group_size = resolve_group_size(self.config.group_size, magnitude.numel())
        loss = seen.loss(pair.inspected, modules[pair.inspected])
        best, best_ratio, best_scales = float("inf"), None, torch.ones_like(magnitude)
        for ratio in _RATIOS:
            scales = magnitude.pow(ratio).clamp(min=1e-4)
            scales = scales / (scales.max() * scales.min()).sqrt()
            for linear, weight in zip(readers, original, strict=True):
                linear.weight.copy_(self._round(weight.float() * scales, group_size).decode() / scales)
            lost = loss()
            if lost < best:
                best, best_ratio, best_scales = lost, ratio, scales
        for linear, weight in zip(readers, original, strict=True):
            linear.weight.copy_(weight)
        if best_ratio is None:
            raise NumericalError(f"awq: no finite loss for {pair.before} -> {pair.inspected}; try --dtype float32")
        expected = view.run(0).float()
        touched = [*modules[pair.before].parameters(recurse=False), *(linear.weight for linear in readers)]
        before = [parameter.clone() for parameter in touched]
        divide(modules[pair.before], best_scales, self.scale_dtype)
        for linear in readers:
            linear.weight.mul_(best_scales.to(linear.weight))
        tolerance = max(_FOLD_ROUNDINGS * torch.finfo(self.scale_dtype).eps, _FOLD_TOLERANCE)
        contribution = (expected - view.hidden[:1].to(expected)).norm()
        rounding = 8 * torch.finfo(view.hidden.dtype).eps * expected.norm()
        if (view.run(0).float() - expected).norm() > tolerance * contribution + rounding:
            for parameter, values in zip(touched, before, strict=True):
                parameter.copy_(values)
            return None
        seen.divide(pair.readers, best_scales)
        return best_ratio

    def _clip(self, weight: Tensor, inputs: Tensor, context: LayerContext) -> Tensor:
        """Clamp each (row, group) of `weight` [m, n] to the range with the least error on `inputs` [tokens, n].

        The error of a group's part of the output, averaged over tokens, is d G d^T with d the change of the weights
        and G the tokens' Gram matrix: no product with the tokens themselves is needed.
        """
        tokens = inputs[:: max(1, inputs.shape[0] // _CLIP_TOKENS)]
        group_size = resolve_group_size(self.config.group_size, weight.shape[1])
        clipped = weight.clone()
        for start in range(0, weight.shape[1], group_size):
            part, x = weight[:, start : start + group_size], tokens[:, start : start + group_size]
            gram = x.T @ x / x.shape[0]
            limit = part.abs().amax(dim=1, keepdim=True)
            best = torch.full_like(limit, float("inf"))
            for share in _CLIPS:
                bound = limit * share
                clamped = part.clamp(-bound, bound)
                change = self._round(clamped, part.shape[1]).decode() - part
                lost = ((change @ gram) * change).sum(dim=1, keepdim=True)
                better = lost < best
                best = torch.where(better, lost, best)
                clipped[:, start : start + group_size] = torch.where(
                    better, clamped, clipped[:, start : start + group_size]
                )
        context.facts["clipped"] = float((clipped != weight).float().mean())
        return clipped


def _is_query_or_key(name: str) -> bool:
    """By the layer's own name, as in the released code."""
    return any(name.rsplit(".", 1)[-1].startswith(mark) for mark in _UNCLIPPED)
