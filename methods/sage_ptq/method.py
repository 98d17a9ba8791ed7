"""SAGE-PTQ as a whole: options, presets, and the order of the steps (figure 1 of the paper).

Filter with the largest salient fraction -> number of groups from the graph -> salient fraction by Brent's method ->
final quantization. Data-free: no calibration, unless `saliency="hessian"` (an ablation of the paper).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from kernels.layouts import CodebookWeight, PackedWeight
from methods.base import LayerContext, MethodConfig, Needs, NominalBits, Provenance, QuantizationMethod
from methods.rounding import store
from methods.sage_ptq.distribution import Distribution
from methods.sage_ptq.grouping import candidate_counts, choose_group_count
from methods.sage_ptq.quantizer import SalientSet
from methods.sage_ptq.saliency import HessianSaliency, MagnitudeSaliency, NoSaliency, PrintedSaliency, Saliency
from methods.sage_ptq.threshold import general_objective, magnitude_objective, minimise, unsalient_bounds
from methods.statistics import LayerStatistics

# Settings of the paper by model family (section 4.1); n_lut is a free choice and stays as it is.
PRESETS: dict[str, dict[str, Any]] = {
    "opt": {"salient_bits": 2, "first_layer_salient_bits": 4, "max_salient": 0.1, "neighbors": 10},
    "llama": {"salient_bits": 4, "max_salient": 0.01, "neighbors": 5},
    "qwen": {"salient_bits": 2, "max_salient": 0.1, "neighbors": 5},
    # The paper states both for DeepSeek-7B.
    "deepseek-2bit": {"salient_bits": 2, "max_salient": 0.1, "neighbors": 5},
    "deepseek-4bit": {"salient_bits": 4, "max_salient": 0.01, "neighbors": 5},
}


class SagePtqConfig(MethodConfig):
    n_lut: int = Field(4, ge=2, le=6, description="bits of the group index; allows 2^(n_lut-1)+1 .. 2^n_lut-1 groups")
    salient_bits: int = Field(4, ge=1, le=8, description="bits of a salient weight, its sign included (N_b)")
    first_layer_salient_bits: int | None = Field(
        None, ge=1, le=8, description="the same for the first decoder block; None: as elsewhere"
    )
    max_salient: float = Field(0.01, ge=0, le=0.5, description="largest salient fraction (zeta_max)")
    neighbors: int = Field(5, ge=1, description="neighbours of a node in the graph")
    subsample: float = Field(0.0003, gt=0, le=1, description="fraction of the unsalient weights that become nodes")
    max_nodes: int = Field(2000, ge=64, description="largest number of nodes; the silhouette is quadratic in it")
    node: Literal["value", "magnitude"] = Field("value", description="what a node of the graph is: w or |w|")
    silhouette_on: Literal["values", "embedding"] = Field(
        "values", description="where the silhouette measures distances: weight values or the spectral embedding"
    )
    quantiles: Literal["gaussian", "empirical", "printed"] = Field(
        "gaussian",
        description="group edges from the fitted Gaussian (eq. 4, with the divisor N that the print lacks), from the "
        "weights' own quantiles, or from eq. 4 to the letter, which leaves one group",
    )
    saliency: Literal["magnitude", "hessian", "none", "printed"] = Field(
        "magnitude",
        description="what makes a weight salient: its magnitude (eq. 2, with Phi^-1(1 - zeta/2)), its Hessian score, "
        "nothing, or eq. 2 to the letter (Phi^-1(zeta/2)), by which all weights are",
    )
    hessian_score: Literal["factor", "inverse", "inverse-squared"] = Field(
        "factor",
        description="divisor of w^2 for saliency='hessian': the squared pivot of the inverse Hessian's Cholesky "
        "factor, the inverse's diagonal, or that squared",
    )
    threshold: Literal["adaptive", "fixed"] = Field(
        "adaptive", description="salient fraction by Brent's method (eq. 11), or always max_salient"
    )
    objective: Literal["relaxed", "discrete"] = Field(
        "relaxed", description="Mode 1 error that Brent sees: before (the paper) or after rounding to salient_bits"
    )
    group_count: int | None = Field(
        None,
        ge=1,
        le=63,
        description="fixed number of groups instead of the graph; the index then needs ceil(log2(N+1)) bits",
    )
    iterations: int | None = Field(None, ge=1, description="steps of Mode 1; None: its fixed point, the row maximum")
    damping: float = Field(0.01, gt=0, le=10, description="Hessian damping, for saliency='hessian' alone")
    preset: Literal["opt", "llama", "qwen", "deepseek-2bit", "deepseek-4bit"] | None = Field(
        None, description="the paper's settings for a model family; options given besides it win"
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, options: Any) -> Any:
        preset = options.get("preset") if isinstance(options, dict) else None
        if isinstance(preset, str) and preset in PRESETS:  # anything else is the field's own check to refuse
            # A preset is a shorthand: the config holds what it stands for. Written out and read again it is then the
            # same, even where an option given besides the preset equals the general default.
            given = {key: value for key, value in options.items() if key != "preset"}
            return {**PRESETS[preset], **given}
        return options


class SagePtq(QuantizationMethod):
    """See the module."""

    Config = SagePtqConfig
    config: SagePtqConfig
    provenance = Provenance(
        paper="arXiv 2606.05429", code="no public code", parity="none possible: no code released", reconstruction=True
    )

    @property
    def needs(self) -> Needs:
        return "hessian" if self.config.saliency == "hessian" else "nothing"

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        prepared, context = self._prepare(weight, context)
        values = prepared.cpu().numpy()
        config = self.config
        bits = config.salient_bits
        if config.first_layer_salient_bits is not None and context.block == 0:
            bits = config.first_layer_salient_bits

        distribution = Distribution.of(values)
        saliency = self._saliency(values, distribution, statistics, prepared, context)
        limit = 0.0 if config.saliency == "none" else config.max_salient
        groups, index_bits = self._groups(values[~saliency.mask(limit)], context)
        zeta = self._threshold(values, distribution, saliency, groups, limit, bits)

        mask = saliency.mask(zeta)
        unsalient = Distribution.of(values, ~mask)
        if not self._nested:
            bounds = unsalient_bounds(unsalient, groups, zeta, config.quantiles)
        else:
            # By magnitude the unsalient weights are the first of all sorted magnitudes, and their edges are the same.
            bounds = distribution.bounds(distribution.edges(groups, zeta, config.quantiles))
        context.facts.update(groups=groups, zeta=zeta, salient_fraction=float(mask.mean()), salient_bits=bits)
        return self._pack(values, mask, unsalient, bounds, index_bits, bits).to(weight.device)

    def nominal_bits(self, packed: PackedWeight) -> NominalBits:
        """1 (1 - zeta) + N_b zeta for the weights, one 16-bit scale per row (section 4); the index is not counted."""
        assert isinstance(packed, CodebookWeight)
        zeta = packed.salient / (packed.shape[0] * packed.shape[1])
        return NominalBits(weight=1 - zeta + packed.salient_bits * zeta, scale=16 / packed.shape[1] if zeta else 0.0)

    @property
    def _nested(self) -> bool:
        """The salient weights are those beyond the last group's edge: one sorting then serves every zeta."""
        return self.config.saliency in ("magnitude", "none") and self.config.quantiles != "printed"

    def _saliency(
        self,
        values: np.ndarray,
        distribution: Distribution,
        statistics: LayerStatistics | None,
        weight: Tensor,
        context: LayerContext,
    ) -> Saliency:
        if self.config.saliency == "hessian":
            factor = self._statistics(statistics, weight, context).inverse_factor(self.config.damping)
            return HessianSaliency(values, factor.upper, self.config.hessian_score)
        if self.config.saliency == "none":
            return NoSaliency(values)
        if self.config.saliency == "printed":
            return PrintedSaliency(values, distribution)
        return MagnitudeSaliency(values, distribution, self.config.quantiles)

    def _groups(self, unsalient: np.ndarray, context: LayerContext) -> tuple[int, int]:
        """The number of groups and the bits of its index, in which 0 is kept for salient weights."""
        config = self.config
        if config.group_count is not None:
            return config.group_count, config.group_count.bit_length()
        if unsalient.size == 0:  # nothing to group
            return candidate_counts(config.n_lut)[0], config.n_lut
        choice = choose_group_count(
            unsalient,
            n_lut=config.n_lut,
            neighbors=config.neighbors,
            subsample=config.subsample,
            max_nodes=config.max_nodes,
            node=config.node,
            silhouette_on=config.silhouette_on,
            seed=config.seed,
        )
        context.facts.update(graph_nodes=choice.nodes, silhouette=choice.silhouettes[choice.groups])
        return choice.groups, config.n_lut

    def _threshold(
        self,
        values: np.ndarray,
        distribution: Distribution,
        saliency: Saliency,
        groups: int,
        limit: float,
        bits: int,
    ) -> float:
        config = self.config
        if config.threshold == "fixed" or limit == 0:
            return limit

        def salient_error(salient: SalientSet) -> float:
            scales = salient.row_scales(config.iterations)
            if config.objective == "discrete":
                return salient.discrete_error(scales, bits)
            return 0.0 if config.iterations is None else salient.relaxed_error(scales)

        if self._nested and config.saliency == "magnitude":
            objective = magnitude_objective(values, distribution, groups, limit, config.quantiles, salient_error)
        else:
            objective = general_objective(values, saliency.mask, groups, config.quantiles, salient_error)
        return minimise(objective, limit)

    def _pack(
        self,
        values: np.ndarray,
        mask: np.ndarray,
        unsalient: Distribution,
        bounds: np.ndarray,
        index_bits: int,
        bits: int,
    ) -> CodebookWeight:
        levels = store(torch.from_numpy(unsalient.group_means(bounds)).float(), self.scale_dtype)
        # The group of an unsalient weight is the number of upper bounds at or below its rank; ties in |w| share a
        # group because bounds never separate equal magnitudes.
        tops = _group_tops(unsalient, bounds)
        index = (np.searchsorted(tops, np.abs(values), side="left") + 1).astype(np.uint8)
        index[mask] = 0
        salient = SalientSet.of(values, mask)
        codes = scales = None
        if salient.values.size:
            scales = store(torch.from_numpy(salient.row_scales(self.config.iterations)).float(), self.scale_dtype)
            codes = torch.from_numpy(salient.codes(scales.double().numpy(), bits))
        return CodebookWeight.pack(
            torch.from_numpy(np.signbit(values)),
            torch.from_numpy(index),
            levels,
            index_bits=index_bits,
            salient_bits=bits,
            salient_codes=codes,
            row_scales=scales,
        )


def _group_tops(unsalient: Distribution, bounds: np.ndarray) -> np.ndarray:
    """The largest magnitude of each group but the last, ascending: [groups - 1]; an empty group repeats the last."""
    ends = bounds[1:-1]
    if unsalient.magnitudes.size == 0:
        return np.full(ends.size, -1.0)
    tops = unsalient.magnitudes[np.maximum(ends - 1, 0)].copy()
    tops[ends == 0] = -1.0  # nothing lies below the first weight
    return tops
