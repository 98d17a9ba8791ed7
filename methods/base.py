"""What a quantization method is: a validated config, what it needs to see, and how it packs one linear layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kernels.errors import InputError
from kernels.finite import all_finite
from kernels.layouts import PackedWeight
from kernels.layouts.base import SCALE_DTYPES
from methods.block import BlockResult, BlockView
from methods.model import ModelView, QuantizedView, Refinement
from methods.statistics import LayerStatistics

# What calibration collects for a method: nothing, the Hessian of each layer's inputs, the inputs themselves as well, or
# whole decoder blocks with the activations in front of them (such a method implements `quantize_block`).
Needs = Literal["nothing", "hessian", "inputs", "block"]

# Whose activations a method that works on whole blocks sees in front of a block: those of the unquantized model, those
# that came through quantized blocks, or the latter together with the unquantized model's inputs and outputs of the
# block.
Stream = Literal["unquantized", "quantized", "both"]


# The largest seed that all generators behind the methods take (NumPy's and scikit-learn's have 32 bits).
MAX_SEED = 2**32 - 1


class MethodConfig(BaseModel):
    """Options that every method has. A method's own config adds fields, each with a default and a description."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    scale_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="dtype in which scales and other constants are stored, and used when decoding"
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of whatever the method draws at random")


@dataclass(frozen=True)
class Provenance:
    """Where a method comes from, shown in tables and in `list methods`."""

    paper: str
    code: str
    """The authors' code that was read (repository and commit), "no public code" or "this project"."""
    parity: str
    """What equality with the authors' code has been tested: "tested on golden vectors", "none released", ..."""
    reconstruction: bool = False
    """True when what could be read leaves so much open that the result is ours as much as the authors'."""
    remark: str = ""
    """What a reader of any of the method's numbers must know, such as that activations are quantized too."""
    basis: str = "the paper's text"
    """What a reconstruction was made from."""


@dataclass(frozen=True)
class NominalBits:
    """Bits per weight as the method's paper counts them: its headline, not what is stored."""

    weight: float
    scale: float


@dataclass
class LayerContext:
    """Where a linear layer stands in the model, and a place for facts that the method wants in the run's log."""

    name: str = "linear"
    block: int = 0
    blocks: int = 1
    facts: dict[str, Any] = field(default_factory=dict)
    plan: Any = None
    """What `plan_model` chose for this layer."""
    bias: Tensor | None = None
    """The layer's bias [out_features], for methods that look at its output; it is not quantized."""


@dataclass(frozen=True)
class LayerSurvey:
    """What is known of a layer before any is quantized. hessian_trace: of its inputs in the unquantized model."""

    out_features: int
    in_features: int
    hessian_trace: float


class QuantizationMethod(ABC):
    """One method. Subclasses set the class variables and implement `quantize_linear` and `nominal_bits`."""

    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    provenance: ClassVar[Provenance]
    stream: ClassVar[Stream] = "unquantized"
    surveys: ClassVar[bool] = False
    """True if `plan_model` is to be called before the first layer is quantized."""
    sample_tokens: ClassVar[int | None] = None
    """Calibration samples that are longer, and a multiple of this, are cut into samples of so many tokens."""

    def __init__(self, config: MethodConfig | None = None) -> None:
        self.config = self.Config() if config is None else config

    @property
    def needs(self) -> Needs:
        """What `quantize_linear` reads from its statistics; calibration collects just that."""
        return "nothing"

    def training_epochs(self, tokens: int) -> float:
        """How often all of so many calibration tokens run through the blocks forward and backward, for the estimate of
        a run's time; 0 for a method that takes no gradients."""
        return 0

    @property
    def calibration_corpus(self) -> str | None:
        """The corpus that this method calibrates on whatever the user chose, "self" being the model's own text; or
        None."""
        return None

    def check_shape(self, out_features: int, in_features: int) -> None:  # noqa: B027 - most methods take any shape
        """Raise InputError if a weight of this shape cannot be quantized with this config; called before a run."""

    @abstractmethod
    def quantize_linear(
        self, weight: Tensor, statistics: LayerStatistics | None = None, context: LayerContext | None = None
    ) -> PackedWeight:
        """Quantize `weight` [out_features, in_features], any float dtype, without changing it.

        `statistics` describes the layer's inputs and may be None for a method whose `needs` is "nothing".
        Raises InputError for a weight that holds NaN or infinity, and for statistics that are missing or do not fit.
        """

    def study(self, view: ModelView) -> None:  # noqa: B027 - most methods know all they need from one layer
        """Look at the whole unquantized model before its first layer is quantized; changes nothing in it.

        For methods that need more than `plan_model` gets: gradients, or what norms say of the layers behind them. A
        method that never studied a model works too.
        """

    def refine(self, view: QuantizedView) -> Refinement | None:
        """Look at the whole model after its last layer was quantized; changes nothing in it.

        For methods that train through all layers together. None leaves everything as it is.
        """
        return None

    @abstractmethod
    def nominal_bits(self, packed: PackedWeight) -> NominalBits:
        """Bits per weight of one quantized matrix, counted as the method's paper counts."""

    def plan_model(self, survey: Mapping[str, LayerSurvey]) -> Mapping[str, Any]:
        """What each layer of a model is to get, by name: for methods that spread bits over the whole model.

        The entry of a layer is handed to `quantize_linear` or `quantize_block` as its context's `plan`.
        """
        raise TypeError(f"method {self.name!r} plans nothing for a whole model")

    def quantize_block(self, view: BlockView, contexts: Mapping[str, LayerContext]) -> BlockResult:
        """Quantize all linear layers of a decoder block at once; for methods whose `needs` is "block".

        May change unquantized parameters of the block in place (scales folded into a norm) as long as the unquantized
        function stays the same; it names them in its result. contexts: one for each layer of `view.linears`.
        """
        raise TypeError(f"method {self.name!r} quantizes layer by layer")

    def _prepare(self, weight: Tensor, context: LayerContext | None) -> tuple[Tensor, LayerContext]:
        """A float32 copy of `weight`, after the checks that every method shares, and a context in any case."""
        context = context or LayerContext()
        if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
            raise InputError(
                f"{context.name}: weight is {weight.dtype} {list(weight.shape)}; "
                "it must be a float matrix [out_features, in_features]"
            )
        self.check_shape(weight.shape[0], weight.shape[1])
        prepared = weight.detach().to(torch.float32, copy=True).contiguous()
        if not all_finite(prepared):
            bad = int((~torch.isfinite(prepared)).sum())
            raise InputError(f"{context.name}: {bad} of {weight.numel()} weights are NaN or infinite")
        return prepared, context

    def _statistics(self, statistics: LayerStatistics | None, weight: Tensor, context: LayerContext) -> LayerStatistics:
        """`statistics` after checking that they are there and fit the weight."""
        if statistics is None:
            raise InputError(
                f"{context.name}: method {self.name!r} needs the layer's inputs; "
                "pass LayerStatistics.from_inputs(x) with x [samples, tokens, in_features]"
            )
        if statistics.in_features != weight.shape[1]:
            raise InputError(
                f"{context.name}: statistics of {statistics.in_features} input features, "
                f"weight has in_features={weight.shape[1]}"
            )
        return statistics

    def _inputs(self, statistics: LayerStatistics, context: LayerContext) -> Tensor:
        """The layer's inputs [samples, tokens, in_features], after checking that they were kept."""
        if statistics.inputs is None:
            raise InputError(f"{context.name}: method {self.name!r} needs the layer's inputs, not only their Hessian")
        return statistics.inputs

    @property
    def scale_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.config.scale_dtype]
