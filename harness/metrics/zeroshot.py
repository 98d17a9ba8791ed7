"""Zero-shot accuracy by lm-evaluation-harness, used as a library: its tasks, its prompts, its scoring, its metrics.

`acc`: the answer with the largest log-likelihood is right; `acc_norm`: the largest log-likelihood per character of the
answer. Both in percent, as papers print them, with the harness's standard error of a mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from torch import nn

from harness.zeroshot.tasks import TaskData, load_task
from kernels.errors import InputError

METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Score:
    """value: percent of documents; stderr: its standard error in percentage points. correct: "1" or "0" a document."""

    value: float
    stderr: float
    correct: str


@dataclass(frozen=True)
class ZeroShot:
    """scores: by metric, `acc` always and `acc_norm` where the stock task has it. examples_available: documents of the
    split. prompts_sha256: over every context, answer and target in order. batch_size: answers
    scored at once. loglikelihood: the sum over all answers,
    which no two different models share."""

    task: str
    task_version: str
    lm_eval: str
    scores: dict[str, Score]
    examples: int
    examples_available: int
    fewshot: int
    prompts_sha256: str
    loglikelihood: float
    batch_size: int

    def as_record(self) -> dict[str, Any]:
        first = self.scores["acc"]
        return {
            "metric": "zeroshot",
            "dataset": self.task,
            "value": first.value,
            "stderr": first.stderr,
            **asdict(self),
        }


def zeroshot(
    model: nn.Module,
    tokenizer: Any,
    data: TaskData,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ZeroShot:
    """Score `model` on the first `limit` documents of a task, or on all of them."""
    import lm_eval

    from harness.zeroshot.model import InMemoryModel

    with _quiet():
        task = load_task(data)
        available = len(task.eval_docs)
        # A truncated limit, since the harness would ask for documents that are not there.
        asked = None if limit is None else min(limit, available)
        wrapped = InMemoryModel(model, tokenizer, progress)
        tasks = {"tasks": {data.task: task}, "groups": {}, "group_map": {}}
        found = lm_eval.evaluate(lm=wrapped, task_dict=tasks, limit=asked, log_samples=True)
    samples = sorted(found["samples"][data.task], key=lambda sample: sample["doc_id"])
    scores = {
        metric: _score(samples, found["results"][data.task], metric) for metric in METRICS if metric in samples[0]
    }
    return ZeroShot(
        task=data.task,
        task_version=str(task.VERSION),
        lm_eval=metadata.version("lm_eval"),
        scores=scores,
        examples=len(samples),
        examples_available=available,
        fewshot=0,
        prompts_sha256=prompts_sha256(samples),
        loglikelihood=_total(samples),
        batch_size=wrapped.largest_batch,
    )


def prompts_sha256(samples: Sequence[dict[str, Any]]) -> str:
    """A hash over all that was asked: every (context, answer) of every document, and its target, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        asked = [[str(part) for part in arguments] for arguments in sample["arguments"]]
        digest.update(json.dumps([asked, sample["target"]], ensure_ascii=False, default=str).encode() + b"\n")
    return digest.hexdigest()


def _score(samples: Sequence[dict[str, Any]], results: dict[str, Any], metric: str) -> Score:
    stderr = results.get(f"{metric}_stderr,none")
    return Score(
        value=100.0 * float(results[f"{metric},none"]),
        # "N/A" for a single document.
        stderr=100.0 * float(stderr) if isinstance(stderr, (int, float)) else 0.0,
        correct="".join("1" if sample[metric] else "0" for sample in samples),
    )


def _total(samples: Sequence[dict[str, Any]]) -> float:
    total = sum(float(answer[0]) for sample in samples for answer in sample["filtered_resps"])
    if total != total or total in (float("inf"), float("-inf")):
        raise InputError(
            "the model's log-likelihoods are not finite: its logits overflow; try --dtype float32 or bfloat16"
        )
    return total


@contextlib.contextmanager
def _quiet() -> Any:
    """The harness and its parts draw bars and log to stderr; what matters is in their results, or raised."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
