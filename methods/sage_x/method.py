"""sage-x as a method: its options, and which ingredients a mode uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from kernels.errors import InputError
from kernels.layouts import PackedWeight, TrellisWeight
from kernels.layouts.trellis import check_rows
from methods.base import LayerContext, MethodConfig, Needs, NominalBits, Provenance, QuantizationMethod
from methods.block import BlockResult, BlockView
from methods.model import ModelView, QuantizedView, Refinement
from methods.sage_x import distillation, tuning
from methods.sage_x.allocation import matrix_budgets
from methods.sage_x.block import BlockEncoder
from methods.sage_x.distillation import distill, head_inputs
from methods.sage_x.encoder import Pivots, encode_matrix, overhead_bytes
from methods.sage_x.norms import input_energies
from methods.sage_x.recipe import Ingredient, Recipe, Tuning
from methods.sage_x.sensitivity import Sensitivity, measure
from methods.sage_x.tuning import epochs_of
from methods.second_order import DampingConfig
from methods.statistics import LayerStatistics


class SageXConfig(DampingConfig):
    budget: float = Field(2.2, ge=1.0, le=7.0, description="stored bits per weight, everything included")
    mode: Literal["calibrated", "self-calibrated", "weights-only"] = Field(
        "calibrated", description="calibration text from outside, from the model itself, or none at all"
    )
    tuning: Tuning = Field(
        "none",
        description="what is trained: nothing, row scales and norm gains block by block, these and weights that are "
        "not encoded yet, or all that and then the scales and gains of the whole model",
    )
    without: list[Ingredient] = Field([], description="ingredients left out, to see what each is worth")

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if self.mode == "weights-only" and self.tuning != "none":
            raise ValueError(f"tuning={self.tuning!r} needs text, and mode='weights-only' has none")
        return self


class SageX(QuantizationMethod):
    """See the package."""

    Config = SageXConfig
    config: SageXConfig
    stream = "both"
    # The first token of a sample is the attention sink of all others, with activations of its own kind. A few long
    # samples have too few of them, and at one bit a sink that was not seen is not made.
    sample_tokens = 256
    provenance = Provenance(
        paper="none (QTIP arXiv 2406.11235, QuIP# 2402.04396, WaterSIC 2603.04956 for its parts)",
        code="this project",
        parity="nothing to compare with",
        remark="calibration samples cut into pieces of 256 tokens",
    )

    def __init__(self, config: MethodConfig | None = None) -> None:
        super().__init__(config)
        # By layer name, from `study`; a layer without an entry gets the budget of the config, and all its tokens and
        # inputs and outputs count alike.
        self._budgets: dict[str, float] = {}
        self._sensitivity: dict[str, Sensitivity] = {}
        self._energies: dict[str, Tensor] = {}
        # What the head of the unquantized model reads, where the whole model is trained.
        self._targets: Tensor | None = None

    @property
    def needs(self) -> Needs:
        return "nothing" if self.config.mode == "weights-only" else "block"

    @property
    def calibration_corpus(self) -> str | None:
        return "self" if self.config.mode == "self-calibrated" else None

    def training_epochs(self, tokens: int) -> float:
        if self.needs == "nothing":
            return 0
        # The gradients of `study`; then before each group of a block, of which most models have four, and at its end.
        of_blocks = {"none": 0, "scales": 1}.get(self.config.tuning, 5)
        epochs = 1 + of_blocks * epochs_of(tuning.STEPS, tokens / tuning.BATCH_TOKENS)
        if self.config.tuning == "model":
            epochs += epochs_of(distillation.STEPS, tokens / distillation.BATCH_TOKENS)
        return epochs

    def check_shape(self, out_features: int, in_features: int) -> None:
        check_rows(out_features)
        size = out_features * in_features
        overhead = 8 * overhead_bytes(out_features, in_features, self.scale_dtype) / size
        if overhead >= self.config.budget:
            raise InputError(
                f"budget={self.config.budget:g} bits per weight is less than the {overhead:.3f} bits that the scales "
                f"of a {out_features} x {in_features} matrix take"
            )

    def study(self, view: ModelView) -> None:
        without = self._recipe.without
        self._budgets, self._sensitivity, self._energies, self._targets = {}, {}, {}, None
        if self.config.mode == "weights-only":
            self._energies = {} if "gains" in without else input_energies(view)
            return
        # A model whose blocks come to the device one at a time has no gradients: every layer then gets the budget.
        whole = len({parameter.device for parameter in view.model.parameters()}) == 1
        if self.config.tuning == "model":
            if not whole:
                raise InputError("tuning='model' needs the whole model on one device; tuning='blocks' does not")
            self._targets = head_inputs(view)
        if not whole or {"allocation", "weighting"} <= without:
            return
        for name, linear in view.linears.items():
            self._prepare(linear.weight, LayerContext(name))  # where a weight is NaN, all that follows is
        self._sensitivity = measure(view, self.config.seed)
        if "allocation" not in without:
            weights = {name: linear.weight.detach() for name, linear in view.linears.items()}
            self._budgets = matrix_budgets(weights, self._sensitivity, self.config.budget, self._recipe)
        for entry in self._sensitivity.values():
            entry.hessian = torch.empty(0)  # of all layers together they are as large as the model
        if "weighting" in without:
            self._sensitivity = {}

    @torch.no_grad()
    def quantize_block(self, view: BlockView, contexts: Mapping[str, LayerContext]) -> BlockResult:
        weights = {name: self._prepare(linear.weight, contexts[name])[0] for name, linear in view.linears.items()}
        full = {name: context.name for name, context in contexts.items()}
        known = {name: self._sensitivity[full[name]] for name in weights if full[name] in self._sensitivity}
        encoder = BlockEncoder(view, weights, known, self._recipe)

        def encode(name: str, weight: Tensor, pivots: Pivots) -> TrellisWeight:
            return self._encode(weight, pivots, contexts[name])

        result = encoder.run(encode, self.config.tuning)
        if encoder.tuned:
            next(iter(contexts.values())).facts["held_out_loss_after_tuning"] = encoder.tuned
        return result

    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        weight, context = self._prepare(weight, context)
        pivots = None
        if self.needs != "nothing":
            pivots = Pivots.of(self._statistics(statistics, weight, context).hessian, self._recipe)
        return self._encode(weight, pivots, context)

    def refine(self, view: QuantizedView) -> Refinement | None:
        targets, self._targets = self._targets, None  # as large as a block's activations, and of no use afterwards
        return None if targets is None else distill(view, targets)

    def _encode(self, weight: Tensor, pivots: Pivots | None, context: LayerContext) -> TrellisWeight:
        found = self._sensitivity.get(context.name)
        budget = self._budgets.get(context.name, self.config.budget)
        importance = None if found is None else found.importance
        inputs = self._energies.get(context.name)
        packed = encode_matrix(weight, pivots, budget, self._recipe, importance, inputs)
        context.facts["budget"] = budget
        if pivots is not None and pivots.factor.damping != self.config.damping:
            context.facts["damping"] = pivots.factor.damping
        return packed.to(weight.device)

    def nominal_bits(self, packed: PackedWeight) -> NominalBits:
        """The claim is what is stored: bits of the codes, and bits of everything else."""
        assert isinstance(packed, TrellisWeight)
        codes = 8 * packed.bytes_by_role()["code"] / (packed.shape[0] * packed.shape[1])
        return NominalBits(weight=codes, scale=packed.payload_bits() - codes)

    @property
    def _recipe(self) -> Recipe:
        config = self.config
        return Recipe(self.scale_dtype, config.seed, config.damping, frozenset(config.without))
