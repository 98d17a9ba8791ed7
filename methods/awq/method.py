"""AWQ's options and its three steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kernels.errors import InputError
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


class AwqConfig(UniformConfig):
    search_tokens: int = Field(
        0, ge=0, description="tokens (whole samples) that the scale search looks at; 0: all calibration tokens"
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
        if statistics.inputs is None:
            raise InputError(f"{context.name}: method 'awq' needs the layer's inputs, not only their Hessian")
        inputs = statistics.inputs.reshape(-1, statistics.in_features).float()
        return self._pack(self._clip(prepared, inputs, context))

    @torch.no_grad()
    def quantize_block(self, view: BlockView, contexts: Mapping[str, LayerContext]) -> BlockResult:
        seen = Activations(view, self._search_samples(view))
        folded: list[str] = []
        for pair in PAIRS:
            modules = dict(view.block.named_modules())
            if all(name in modules for name in (pair.before, *pair.readers)) and foldable(modules, pair):
                ratio = self._scale(view, pair, modules, seen)
                folded += unquantized(pair, modules)
                for reader in pair.readers:
                    contexts[reader].facts["ratio"] = ratio
        packed, targets = {}, {}
        for name, linear in view.linears.items():
            weight, context = self._prepare(linear.weight, contexts[name])
            targets[name] = weight
            clipped = (
                weight if any(mark in name for mark in _UNCLIPPED) else self._clip(weight, seen.inputs(name), context)
            )
            packed[name] = self._pack(clipped)
        return BlockResult(packed, targets, tuple(dict.fromkeys(folded)))

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

    def _scale(self, view: BlockView, pair: Pair, modules: dict[str, Any], seen: Activations) -> float:
        """Search the exponent of one pair and fold the scales; returns the exponent."""
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
            raise InputError(f"awq: no finite loss for {pair.before} -> {pair.inspected}; try --dtype float32")
        divide(modules[pair.before], best_scales, self.scale_dtype)
        for linear in readers:
            linear.weight.mul_(best_scales.to(linear.weight))
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
