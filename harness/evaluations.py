"""One evaluation of a run, whatever its metric: its input found and checked first, measured later.

What can be wrong with the input is found by `prepare`, before anything long begins.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from harness.corpora import Text, dataset_name, load_text, tokenize
from harness.metrics.divergence import divergence
from harness.metrics.perplexity import cut_windows, perplexity
from harness.models.load import LoadedModel, load_model
from harness.reference import Reference, build_reference, load_reference, reference_key
from harness.spec import DivergenceSpec, ModelSpec, PerplexitySpec, QualitySpec, RunSpec, ZeroShotSpec
from harness.zeroshot.tasks import TaskData, task_data
from kernels.errors import InputError

# Called with (steps done, steps in all).
Steps = Callable[[int, int], None]


@dataclass
class Prepared:
    """An evaluation with its input: a text and its token ids [tokens], or a task's documents."""

    spec: QualitySpec
    text: Text | None = None
    ids: Tensor | None = None
    data: TaskData | None = None
    reference: Reference | None = None

    @property
    def label(self) -> str:
        """What is measured, for people: "perplexity on wikitext2"."""
        return f"{self.spec.metric} on {self.data.task if self.data else self.text.dataset if self.text else '?'}"

    def data_record(self) -> dict[str, Any]:
        """Where the input came from, and its checksum, for the record."""
        if self.data is not None:
            name = None if self.data.path is None else self.data.path.name
            return {"task": self.data.task, "source": name or "hub", "sha256": self.data.sha256}
        assert self.text is not None and self.ids is not None
        return {**text_record(self.text), "tokens_sha256": _ids_sha256(self.ids)}


def prepare(evaluation: QualitySpec, loaded: LoadedModel) -> Prepared:
    """Raises InputError for a text or documents that are missing, damaged or too short."""
    if isinstance(evaluation, ZeroShotSpec):
        data = task_data(evaluation.task, evaluation.source)
        _check_content(f"task {evaluation.task!r}: its file", data.sha256, evaluation.content)
        return Prepared(evaluation, data=data)
    text = load_text(evaluation.corpus, evaluation.split, evaluation.content)
    ids = tokenize(text, loaded.tokenizer)
    check_vocabulary(ids, loaded)
    try:
        cut_windows(ids, evaluation.context)
    except InputError as error:
        raise InputError(f"corpus {text.corpus!r} ({text.split}): {error}") from None
    return Prepared(evaluation, text=text, ids=ids)


def check_model(spec: RunSpec, loaded: LoadedModel) -> None:
    """Raise InputError if the model is not the one that `spec` was planned with, or has too few positions for it."""
    _check_content(f"model {spec.model.name!r}: what is there", loaded.sha256, spec.model.content)
    # Beyond its positions a model fails, or its numbers mean nothing.
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    parts = (*spec.quality, spec.calibration)
    asked = [part.context for part in parts if part is not None and not isinstance(part, ZeroShotSpec)]
    if positions is not None and max(asked, default=0) > positions:
        raise InputError(
            f"context {max(asked)} is longer than the {positions} positions of model {spec.model.name!r}; "
            f"use --context {positions} or less"
        )


def _check_content(what: str, found: str | None, planned: str | None) -> None:
    """A run's key holds the checksum (16 digits) it was planned with: under it nothing else may be measured."""
    if planned is not None and (found or "")[:16] != planned:
        raise InputError(f"{what} has sha256 {(found or '')[:16]}..., planned with {planned}...; run the command again")


def check_vocabulary(ids: Tensor, loaded: LoadedModel) -> None:
    """Raise InputError if a token id of `ids` is not in the model's vocabulary."""
    known = loaded.model.get_input_embeddings().num_embeddings
    if ids.numel() and int(ids.max()) >= known:
        raise InputError(
            f"the tokenizer of model {loaded.source.name!r} gives token {int(ids.max())}, but the model has a "
            f"vocabulary of {known}; give the tokenizer that the model was trained with"
        )


def make_reference(
    prepared: Prepared, model: ModelSpec, loaded: LoadedModel, progress: Steps, beside: Sequence[str] = ()
) -> str:
    """What divergence is measured from: kept from earlier, or made now by the model that is not quantized yet.

    Returns its key. beside: keys of the run's other references.
    If the reference has another dtype than the run, the model is loaded a second time; for that while both are there.
    """
    spec, text, ids = prepared.spec, prepared.text, prepared.ids
    assert isinstance(spec, DivergenceSpec) and text is not None and ids is not None
    windows = cut_windows(ids, spec.context, spec.windows)
    key = reference_key(
        model=loaded.sha256,
        reparameterized=[model.reparameterize, model.seed],
        text=text.sha256,
        tokens=_ids_sha256(windows),
        dtype=spec.reference_dtype,
        device=model.device,
        context=spec.context,
        windows=len(windows),
    )
    prepared.reference = load_reference(key)
    if prepared.reference is not None:
        return key
    same = spec.reference_dtype == model.dtype
    unquantized = loaded if same else load_model(
        model.name, spec.reference_dtype, model.device, reparameterized=model.reparameterize, seed=model.seed
    )  # fmt: skip
    prepared.reference = build_reference(key, unquantized.model, windows, progress, beside)
    del unquantized
    gc.collect()
    return key


def measure(prepared: Prepared, loaded: LoadedModel, weights: str, progress: Steps, *, fresh: bool) -> dict[str, Any]:
    """The entry of a record. weights: the key of the weights that are in the model; fresh: measure even if cached."""
    spec = prepared.spec
    if isinstance(spec, ZeroShotSpec):
        assert prepared.data is not None
        return _zeroshot(spec, prepared.data, loaded, weights, progress, fresh)
    text, ids = prepared.text, prepared.ids
    assert text is not None and ids is not None
    where = {"corpus": text.corpus, "dataset": text.dataset, "split": text.split}
    if isinstance(spec, PerplexitySpec):
        bos = loaded.tokenizer.bos_token_id is not None and int(ids[0]) == loaded.tokenizer.bos_token_id
        found = perplexity(
            loaded.model, ids, context=spec.context, limit=spec.windows, bos=bos, progress=progress
        )  # fmt: skip
        return {**found.as_record(), **where}
    assert prepared.reference is not None
    apart = divergence(
        loaded.model, ids, prepared.reference, context=spec.context, limit=spec.windows, progress=progress
    )
    return {**apart.as_record(), **where}


def same_as_reference(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """True if a quantized model's entry shows the very logits of the unquantized one, or of its reference."""
    if mine["metric"] == "divergence" and mine.get("value") == 0.0:
        return True
    exact = {"perplexity": "nll", "divergence": "window_kl", "zeroshot": "loglikelihood"}[mine["metric"]]
    return mine.get(exact) is not None and mine.get(exact) == theirs.get(exact)


def gap(mine: dict[str, Any], theirs: dict[str, Any]) -> float:
    """How much worse or better than the unquantized model: in nats a token, or in percentage points of accuracy.

    For divergence theirs is the noise floor: a second unquantized pass, with 16-bit weights in the run's dtype.
    """
    number = "nll" if mine["metric"] == "perplexity" else "value"
    return mine[number] - theirs[number]


def text_record(text: Text) -> dict[str, str]:
    """Where a text came from, for the record."""
    return {
        "corpus": text.corpus,
        "dataset": dataset_name(text.corpus),
        "split": text.split,
        "source": text.source if text.source.startswith(("wheel", "hub")) else text.source.rsplit("/", 1)[-1],
        "sha256": text.sha256,
    }


def _ids_sha256(ids: Tensor) -> str:
    return hashlib.sha256(ids.cpu().contiguous().numpy().tobytes()).hexdigest()


def _zeroshot(
    spec: ZeroShotSpec, data: TaskData, loaded: LoadedModel, weights: str, progress: Steps, fresh: bool
) -> dict[str, Any]:
    from importlib import metadata

    from harness.metrics.zeroshot import zeroshot
    from harness.zeroshot.results_cache import load_result, result_key, save_result, tokenizer_sha256
    from harness.zeroshot.tasks import stock_sha256

    key = result_key(
        weights,
        tokenizer=tokenizer_sha256(loaded.tokenizer),
        task=spec.task,
        stock=stock_sha256(spec.task),
        versions=[metadata.version(name) for name in ("lm_eval", "transformers", "torch")],
        source=spec.source,
        data=data.sha256,
        limit=spec.limit,
    )
    kept = None if fresh else load_result(key)
    if kept is None:
        found = zeroshot(loaded.model, loaded.tokenizer, data, limit=spec.limit, progress=progress)
        kept = found.as_record()
        save_result(key, kept)
    return {**kept, "source": spec.source, "dtype": str(loaded.model.dtype).removeprefix("torch.")}
