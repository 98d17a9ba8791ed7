"""A model in memory as lm-evaluation-harness wants it: same likelihoods as the harness's own loop, in half the time.

The answers of a question share its context. The context goes through the model once, its keys and values are used for
every answer, and the head sees only positions that are scored: half the work of the harness's own loop for questions
with four answers, and no padding of contexts, since contexts of one length go together. Requests longer than the
model's context, and models without a cache of keys and values, go through the harness's loop.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from harness.memory import available_memory

# Tokens of contexts that go through the model at once: beyond this nothing is gained.
_TOKENS = {"cpu": 1024, "cuda": 16384}
# Sequences at once in the harness's own loop.
_SEQUENCES = {"cpu": 16, "cuda": 128}
# Padded tokens that cost as much as one more pass through the model, which reads all its weights.
_PADDING = 32
# Logits, their log-softmax, and a copy of either: float32 numbers of [tokens, vocabulary] at once.
_COPIES = 3
_SHARE_OF_FREE_MEMORY = 0.4


@dataclass(frozen=True)
class _Question:
    """A context and the answers to it, by their place among the requests."""

    context: tuple[int, ...]
    answers: dict[int, list[int]]

    @property
    def longest(self) -> int:
        return max(len(answer) for answer in self.answers.values())


@dataclass(frozen=True)
class _Answer:
    """One answer: its place among the requests, the number of its question in the batch, its token ids."""

    place: int
    question: int
    ids: list[int]


class InMemoryModel(HFLM):
    """`model` (dense or packed, on any device) for the harness; log-softmax in float32, whatever the model's dtype.

    progress: called with (answers scored, answers in all). largest_batch: answers that were scored at once.
    """

    def __init__(self, model: Any, tokenizer: Any, progress: Callable[[int, int], None]) -> None:
        super().__init__(
            pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=1, softmax_dtype=torch.float32
        )
        self._progress = progress
        self._most = sys.maxsize  # questions at once, less after memory ran out
        self.largest_batch = 0

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None) -> Any:
        """(log-likelihood, is the answer the greedy one) of each (texts, context ids, answer ids), in order."""
        found: list[tuple[float, bool] | None] = [None] * len(requests)
        shared = _keeps_keys_and_values(self.model)
        questions: dict[tuple[int, ...], dict[int, list[int]]] = defaultdict(dict)
        for place, (_, context, answer) in enumerate(requests):
            if shared and len(context) + len(answer) <= self.max_length:
                questions[tuple(context)][place] = answer
        done = 0
        for batch in self._batches([_Question(context, answers) for context, answers in questions.items()]):
            for place, likelihood in self._score(batch).items():
                found[place] = likelihood
                done += 1
            self._progress(done, len(requests))
        rest = [place for place, likelihood in enumerate(found) if likelihood is None]
        if rest:
            self.cache_hook = _Counter(done, len(requests), self._progress)
            for place, likelihood in zip(rest, self._one_by_one([requests[place] for place in rest]), strict=True):
                found[place] = likelihood
        return found

    def _batches(self, questions: list[_Question]) -> Iterator[list[_Question]]:
        """Questions with contexts of one length, longest first, as many as fit."""
        tokens = _TOKENS[self.device.type if self.device.type in _TOKENS else "cuda"]
        by_length: dict[int, list[_Question]] = defaultdict(list)
        for question in questions:
            by_length[len(question.context)].append(question)
        for length in sorted(by_length, reverse=True):
            waiting = sorted(by_length[length], key=lambda question: question.longest, reverse=True)
            while waiting:
                answers = max(len(question.answers) for question in waiting)
                fit = self._fitting(waiting[0].longest) // answers
                count = max(1, min(tokens // length, fit, self._most))
                yield waiting[:count]
                del waiting[:count]

    def _score(self, questions: list[_Question]) -> dict[int, tuple[float, bool]]:
        """As `_share`, in halves where the memory does not hold the whole."""
        try:
            found = self._share(questions)
            self.largest_batch = max(self.largest_batch, len(found))
            return found
        except torch.OutOfMemoryError:
            # The estimate cannot know what else the model holds on its device.
            if len(questions) == 1:
                raise
        # Not before the error is let go: it holds on to all that the attempt had on the device.
        torch.cuda.empty_cache()
        half = self._most = len(questions) // 2
        return {**self._score(questions[:half]), **self._score(questions[half:])}

    @torch.inference_mode()
    def _share(self, questions: list[_Question]) -> dict[int, tuple[float, bool]]:
        """Likelihoods by place, of questions whose contexts have one length."""
        contexts = torch.tensor([question.context for question in questions], device=self.device)
        # The last position by its number: a slice of one would make the head multiply question by question.
        last = torch.tensor([contexts.shape[1] - 1], device=self.device)
        seen = self.model(contexts, use_cache=True, logits_to_keep=last)
        found: dict[int, tuple[float, bool]] = {}
        for answers in _alike_in_length(questions):
            of_answer = torch.tensor([answer.question for answer in answers], device=self.device)
            logits = seen.logits[of_answer]  # [answers, 1, vocabulary]: for the first token of each
            # Padding stands to the right, where no scored position looks.
            ids = nn.utils.rnn.pad_sequence([torch.tensor(answer.ids) for answer in answers], batch_first=True)
            ids = ids.to(self.device)
            if ids.shape[1] > 1:
                cache = copy.deepcopy(seen.past_key_values)
                cache.batch_select_indices(of_answer)
                more = self.model(ids[:, :-1], past_key_values=cache, use_cache=True).logits
                logits = torch.cat([logits, more], dim=1)
            chosen, greedy = _of_targets(logits, ids)
            for row, answer in enumerate(answers):
                length = len(answer.ids)
                found[answer.place] = float(chosen[row, :length].sum()), bool(greedy[row, :length].all())
        return found

    def _one_by_one(self, requests: Any) -> Any:
        """The harness's own loop."""
        longest = max(len(context) + len(answer) for _, context, answer in requests)
        size = min(_SEQUENCES["cpu" if self.device.type == "cpu" else "cuda"], self._fitting(longest))
        while True:
            self.batch_size_per_gpu = size
            try:
                found = super()._loglikelihood_tokens(requests, disable_tqdm=True)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                torch.cuda.empty_cache()
                size //= 2
                continue
            self.largest_batch = max(self.largest_batch, min(size, len(requests)))
            return found

    def _fitting(self, tokens: int) -> int:
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        return fitting_sequences(min(tokens, self.max_length), vocabulary, str(self.device))


def _alike_in_length(questions: list[_Question]) -> Iterator[list[_Answer]]:
    """The answers to `questions`, longest first, in runs with little padding in each."""
    answers = [
        _Answer(place, number, ids)
        for number, question in enumerate(questions)
        for place, ids in question.answers.items()
    ]
    run: list[_Answer] = []
    padding = 0
    for answer in sorted(answers, key=lambda answer: len(answer.ids), reverse=True):
        missing = len(run[0].ids) - len(answer.ids) if run else 0
        if padding + missing > _PADDING:
            yield run
            run, padding, missing = [], 0, 0
        run.append(answer)
        padding += missing
    yield run


def fitting_sequences(tokens: int, vocabulary: int, device: str) -> int:
    """Sequences of `tokens` scored tokens whose logits fit into a part of the memory that is free: at least 1."""
    row = tokens * vocabulary * 4 * _COPIES
    return max(1, int(available_memory(device) * _SHARE_OF_FREE_MEMORY / row))


def _of_targets(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of `ids` [answers, tokens], and whether it is the most likely one."""
    found = logits.float().log_softmax(dim=-1)
    chosen = found.gather(2, ids[:, :, None])[:, :, 0]
    return chosen.cpu(), (found.argmax(dim=-1) == ids).cpu()


def _keeps_keys_and_values(model: Any) -> bool:
    """True if the model's forward pass can go on from kept keys and values, and score chosen positions only."""
    known = inspect.signature(model.forward).parameters
    return {"past_key_values", "use_cache", "logits_to_keep"} <= known.keys()


class _Counter(CacheHook):
    """The harness tells its cache of every answered request; this one only counts them."""

    def __init__(self, done: int, total: int, progress: Callable[[int, int], None]) -> None:
        super().__init__(None)
        self._done = done
        self._total = total
        self._progress = progress

    def add_partial(self, attr: Any, req: Any, res: Any) -> None:
        self._done += 1
        self._progress(min(self._done, self._total), self._total)
