"""Two runs compared pair by pair: which differences are more than noise.

Accuracies: McNemar's test on the examples that exactly one of the two got right, with the exact binomial distribution
(McNemar 1947; Dietterich 1998, section 3.1). Perplexity and KL: a paired bootstrap over windows (Efron and Tibshirani
1993, chapter 13): resample the windows' differences, since both runs read the same text. Few windows show little
however clear they look: no p is smaller than the chance that all differences have one sign. Where one run read more
windows of a text than the other, the windows that both read are compared. Reads records only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from harness.nll import perplexity_of
from harness.records import RecordStore
from kernels.errors import InputError, did_you_mean

RESAMPLES = 10_000
SIGNIFICANT = 0.05
# Metrics that come in pairs: examples or windows.
_PAIRED = ("zeroshot", "perplexity", "divergence")
# Of a record's data: the checksum of a text's token ids. Records of earlier versions lack it.
_TOKENS = "tokens_sha256"


@dataclass(frozen=True)
class Comparison:
    """One metric of two runs. difference: second less first, in `unit`; low, high: its 95 % interval. p: two-sided, of
    no difference. pairs: examples or windows. detail: what the test saw."""

    metric: str
    dataset: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    unit: str
    pairs: int
    detail: str

    @property
    def is_noise(self) -> bool:
        """True if so large a difference comes by chance more often than once in twenty."""
        return self.p >= SIGNIFICANT


def compare_records(first: dict[str, Any], second: dict[str, Any], seed: int = 0) -> list[Comparison]:
    """Every metric that both runs have. Raises InputError if there is none, or if they did not read the same."""
    found: list[Comparison] = []
    theirs = {_measured(entry): place for place, entry in enumerate(second["spec"]["evaluations"])}
    for place, entry in enumerate(first["spec"]["evaluations"]):
        if entry["metric"] not in _PAIRED or _measured(entry) not in theirs:
            continue
        other = theirs[_measured(entry)]
        _check_same_text((first, second), (place, other))
        metrics = first["metrics"][place], second["metrics"][other]
        if entry["metric"] == "zeroshot":
            found += _accuracies(*metrics)
        else:
            shorter = entry.get("windows") != second["spec"]["evaluations"][other].get("windows")
            found.append(_windows(*metrics, seed, shorter=shorter))
    if not found:
        measured = [", ".join(map(_named, run["spec"]["evaluations"])) for run in (first, second)]
        raise InputError(
            f"runs {first['key']} and {second['key']} measured different things and cannot be paired: {measured[0]}; "
            f"{measured[1]}"
        )
    return found


def not_shared(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What one of two runs alone measured, or measured in another way, in words."""
    lists = [run["spec"]["evaluations"] for run in (first, second)]
    sets = [{_measured(entry) for entry in entries} for entries in lists]
    return [
        f"{_named(entry)} ({which} alone)"
        for entries, others, which in zip(lists, reversed(sets), ("first", "second"), strict=True)
        for entry in entries
        if _measured(entry) not in others
    ]


def mcnemar(first: str, second: str) -> tuple[int, int, float]:
    """Examples that only the first got right, those that only the second did, and the exact two-sided p.

    first, second: "1" or "0" for each example, the same examples in the same order.
    """
    if len(first) != len(second):
        raise InputError(f"{len(first)} and {len(second)} examples cannot be paired; both runs must have the same")
    only_first = sum(mine > theirs for mine, theirs in zip(first, second, strict=True))
    only_second = sum(mine < theirs for mine, theirs in zip(first, second, strict=True))
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    # Integers throughout: 2**-n underflows for a thousand examples.
    tail = 2 * sum(comb(discordant, count) for count in range(fewer + 1))
    return only_first, only_second, 1.0 if tail >= 2**discordant else tail / 2**discordant


def paired_bootstrap(differences: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The 95 % interval of the mean of `differences`, and a two-sided p for a mean of 0.

    The interval is the percentile interval; p is twice the share of resampled means on the other side of 0, and at
    least 2^(1 - windows): n differences that are all noise have one sign that often. `seed` decides the resamples.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        raise InputError("one window cannot be resampled; measure with at least --windows 2")
    draw = np.random.default_rng(seed)
    means = np.array([values[draw.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)])
    low, high = np.percentile(means, [2.5, 97.5])
    # One is added above and below: no finite number of resamples shows a p of 0.
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = max(2 * (beyond + 1) / (RESAMPLES + 1), 2.0 ** (1 - len(values)))
    return float(low), float(high), min(1.0, p)


def show_comparison(first: str, second: str, out: Path, seed: int = 0, console: Console | None = None) -> None:
    """Print the comparison of two finished runs by key."""
    store = RecordStore(out / "runs")
    runs = [_load(store, key) for key in (first, second)]
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, width=160, highlight=False)
    for name, record in zip(("first", "second"), runs, strict=True):
        console.print(f"{name}: {_describe(record)}  ({record['key']})", markup=False)
    table = Table("metric", "on", "pairs", "first", "second", "difference", "95 % interval", "p", "verdict", "detail")
    for found in compare_records(runs[0], runs[1], seed):
        table.add_row(
            found.metric,
            found.dataset,
            str(found.pairs),
            _shown(found.first),
            _shown(found.second),
            f"{found.difference:+.4g} {found.unit}",
            f"{found.low:+.4g} to {found.high:+.4g}",
            f"{found.p:.2g}",
            "noise" if found.is_noise else "differs",
            found.detail,
        )
    console.print(table)
    for name in not_shared(*runs):
        console.print(f"not compared: {name}", markup=False)
    console.print(f"noise: p of {SIGNIFICANT} or more; with many rows some differ by chance alone", markup=False)


def _load(store: RecordStore, key: str) -> dict[str, Any]:
    record = store.load(key)
    if record is None:
        known = sorted(path.stem for path in store.folder.glob("*.json") if not path.name.endswith(".failed.json"))
        raise InputError(f"no finished run {key!r} below {store.folder}{did_you_mean(key, known)}")
    return record


def _measured(evaluation: dict[str, Any]) -> str:
    """What an evaluation of a spec measured, apart from how many windows of its text: those are counted from its start,
    so that two runs share as many as the shorter one has."""
    return json.dumps({name: value for name, value in evaluation.items() if name != "windows"}, sort_keys=True)


def _named(evaluation: dict[str, Any]) -> str:
    on = evaluation.get("task") or evaluation.get("corpus")
    details = ", ".join(f"{name} {evaluation[name]}" for name in ("split", "context", "limit") if evaluation.get(name))
    return evaluation["metric"] + (f" on {on}" if on else "") + (f" [{details}]" if details else "")


def _check_same_text(runs: Sequence[dict[str, Any]], places: Sequence[int]) -> None:
    mine, theirs = (run["data"]["evaluations"][place] for run, place in zip(runs, places, strict=True))
    first, second = (run["key"] for run in runs)
    if mine.get("sha256") != theirs.get("sha256"):
        raise InputError(f"runs {first} and {second} read different texts and cannot be paired")
    if len({entry[_TOKENS] for entry in (mine, theirs) if _TOKENS in entry}) > 1:
        raise InputError(
            f"runs {first} and {second} cut the text into different tokens, so their windows cannot be paired; compare "
            "models that share a tokenizer"
        )


def _accuracies(mine: dict[str, Any], theirs: dict[str, Any]) -> list[Comparison]:
    task = mine["dataset"]
    if mine["prompts_sha256"] != theirs["prompts_sha256"]:
        raise InputError(f"the two runs were asked different prompts of {task}; measure one of them again with --fresh")
    found = []
    for metric in mine["scores"]:
        one, other = mine["scores"][metric], theirs["scores"][metric]
        only_first, only_second, p = mcnemar(one["correct"], other["correct"])
        count = len(one["correct"])
        gap = (only_second - only_first) / count
        # Standard error of a mean of paired differences of -1, 0 and 1.
        error = sqrt(max((only_first + only_second) / count - gap**2, 0.0) / count)
        found.append(
            Comparison(
                metric=metric,
                dataset=task,
                first=one["value"],
                second=other["value"],
                difference=100 * gap,
                low=100 * (gap - 1.96 * error),
                high=100 * (gap + 1.96 * error),
                p=p,
                unit="points",
                pairs=count,
                detail=f"right in one only: {only_first} / {only_second}",
            )
        )
    return found


def _windows(mine: dict[str, Any], theirs: dict[str, Any], seed: int, *, shorter: bool) -> Comparison:
    metric, where = mine["metric"], f"{mine['metric']} on {mine['dataset']}"
    name = {"perplexity": "window_nll", "divergence": "window_kl"}[metric]
    read = [_losses(entry, name, where) for entry in (mine, theirs)]
    shared = min(map(len, read))
    if len(read[0]) != len(read[1]) and not shorter:
        raise InputError(f"{where}: {len(read[0])} and {len(read[1])} windows of as many that were asked for")
    lists = [losses[:shared] for losses in read]
    differences = [other - one for one, other in zip(*lists, strict=True)]
    low, high, p = paired_bootstrap(differences, seed)
    means = [sum(losses) / shared for losses in lists]
    values = [perplexity_of(mean) for mean in means] if metric == "perplexity" else means
    return Comparison(
        metric="KL" if metric == "divergence" else metric,
        dataset=mine["dataset"],
        first=values[0],
        second=values[1],
        difference=sum(differences) / shared,
        low=low,
        high=high,
        p=p,
        unit="nats",
        pairs=shared,
        detail=f"second larger in {sum(value > 0 for value in differences)} windows{_few(shared)}"
        + (f"; the first {shared} of {max(map(len, read))}" if len(read[0]) != len(read[1]) else ""),
    )


def _losses(entry: dict[str, Any], name: str, where: str) -> list[float]:
    values = entry.get(name)
    if not isinstance(values, list) or not all(isfinite(value) for value in values):
        raise InputError(f"{where}: the record has no {name}, an earlier version wrote it; repeat the run with --fresh")
    return values


def _few(windows: int) -> str:
    return "; too few windows to show a difference" if 2.0 ** (1 - windows) >= SIGNIFICANT else ""


def _describe(record: dict[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in record["spec"]["method"]["options"].items())
    return f"{record['spec']['method']['name']}({options}) on {record['spec']['model']['name']}"


_shown: Callable[[float], str] = "{:.4g}".format
