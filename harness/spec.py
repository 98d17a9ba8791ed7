"""A run as data: everything that decides its result, and the key under which the result is kept."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

# Part of every key: raise it when a change makes earlier results wrong or incomparable.
SPEC_VERSION = 1
# In place of a method's name: the model is measured as it is stored.
STORED = "stored"
# The method that changes nothing; its run is what others are compared with.
UNQUANTIZED = "fp16"


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class ModelSpec(Spec):
    name: str
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "cpu"
    reparameterize: bool = False
    seed: int = Field(0, ge=0)
    """Seed of the reparameterization; without it always 0."""
    content: str | None = None
    """Checksum of a folder (weights, configuration, tokenizer) or file of the user's: other content is another run."""
    quantized_blocks: int | None = Field(None, ge=1)
    """Only the linear layers of the first N decoder blocks are quantized; None for all (the regression gate's)."""


class MethodSpec(Spec):
    name: str
    options: dict[str, Any] = {}
    """Options that differ from their defaults, as the method's validated config gives them."""


class CalibrationSpec(Spec):
    corpus: str
    split: str = "train"
    samples: int = Field(128, ge=1)
    context: int = Field(2048, ge=2)
    seed: int = Field(0, ge=0)
    content: str | None = None
    """Checksum of the text, where it comes from a local file."""


class _TextSpec(Spec):
    """What evaluations on a text have in common."""

    corpus: str
    split: str = "test"
    context: int = Field(2048, ge=2)
    windows: int | None = Field(None, ge=1)
    """How many windows from the start of the text; None for all."""
    content: str | None = None
    """Checksum of the text, where it comes from a local file."""


class PerplexitySpec(_TextSpec):
    metric: Literal["perplexity"] = "perplexity"


class ZeroShotSpec(Spec):
    metric: Literal["zeroshot"] = "zeroshot"
    task: str
    source: Literal["local", "hub"]
    """Where the documents come from: the folder SAGEBENCH_DATA, or the data set that the stock task names."""
    limit: int | None = Field(None, ge=1)
    """How many documents from the start of the split; None for all."""
    content: str | None = None
    """Checksum of the documents, where they come from a local file."""


class DivergenceSpec(_TextSpec):
    metric: Literal["divergence"] = "divergence"
    reference_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Dtype of the unquantized model that gives P_ref, whatever the dtype of the run."""


class RuntimeSpec(Spec):
    """How the packed weights are run, for the metrics that measure running rather than quality."""

    runtime: Literal["resident", "banded", "dense"] = "resident"
    """resident: all packed weights on the device. banded: the paper's section 3.4, index planes in host memory and
    bands of layers prefetched. dense: weights decoded once."""
    band: int | None = Field(None, ge=1)
    """Layers a band, banded runtime only; None for one."""
    batch: int = Field(1, ge=1)
    prompt: int = Field(128, ge=1)
    """Tokens of the prompt."""
    tokens: int = Field(64, ge=2)
    """Tokens generated after it, a round."""
    synthetic: bool = False
    """The model's shapes with random packed weights: time and memory do not depend on their values."""
    conditions: dict[str, Any] | None = None
    """Device, processor, threads and versions, where a record made under others is another run's; None in the plan of
    a table, which is the same on all machines that share its runs."""

    @model_serializer(mode="wrap")
    def _without_nothing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """`conditions` came later and is left out where it says nothing: old keys stay."""
        content: dict[str, Any] = serialize(self)
        if content.get("conditions") is None:
            content.pop("conditions", None)
        return content


class DecodeSpec(RuntimeSpec):
    metric: Literal["decode"] = "decode"
    rounds: int = Field(7, ge=1)
    """Timed rounds of each arm, in turns with the other arms, after a warm-up."""


class MemorySpec(RuntimeSpec):
    metric: Literal["memory"] = "memory"


# What a run measures, told apart by `metric`. The JSON form of a perplexity evaluation is part of every old key.
QualitySpec = PerplexitySpec | ZeroShotSpec | DivergenceSpec
EvaluationSpec = Annotated[QualitySpec | DecodeSpec | MemorySpec, Field(discriminator="metric")]


class RunSpec(Spec):
    """One run: a model, a method, the text it is calibrated on (None if it needs none), and what is measured."""

    model: ModelSpec
    method: MethodSpec
    calibration: CalibrationSpec | None
    evaluations: tuple[EvaluationSpec, ...]

    @property
    def key(self) -> str:
        """16 hex digits that identify the spec."""
        return _hash(self._content())

    @property
    def quality(self) -> tuple[QualitySpec, ...]:
        """What is measured of the model's outputs; running it (decode, memory) has a runner of its own."""
        return tuple(part for part in self.evaluations if not isinstance(part, RuntimeSpec))

    def quantization_key(self, *facts: str) -> str:
        """A key for the quantized weights alone: what is measured on them does not matter.

        facts: whatever else decides the weights (fingerprints of the model's files, the text and the code).
        """
        return _hash({**self._content("evaluations"), "facts": facts})

    def _content(self, *without: str) -> dict[str, Any]:
        """What keys are made from. A field that came later is left out where it says nothing: old keys stay."""
        content = self.model_dump(mode="json", exclude=set(without))
        if content["model"]["quantized_blocks"] is None:
            del content["model"]["quantized_blocks"]
        return content

    def describe(self) -> str:
        """The method and its options in one line."""
        options = ", ".join(f"{key}={value}" for key, value in self.method.options.items())
        return f"{self.method.name}({options}) on {self.model.name}"


def _hash(content: dict[str, Any]) -> str:
    text = json.dumps({"version": SPEC_VERSION, **content}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
