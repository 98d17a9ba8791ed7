"""From an experiment and the user's choices to the runs that fill its table."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from harness.catalog import find_task
from harness.catalog import models as catalogue
from harness.corpora import dataset_name, local_checksum, resolve_corpus
from harness.devices import chosen_device
from harness.experiments import Experiment, Profile, Row, load_profile
from harness.hub import hub_allowed
from harness.models.source import is_local, planned_content, require_unquantized, resolve_model
from harness.plan import PlannedRow, TablePlan
from harness.runtime.architecture import catalogued
from harness.spec import (
    UNQUANTIZED,
    CalibrationSpec,
    DecodeSpec,
    DivergenceSpec,
    EvaluationSpec,
    MemorySpec,
    MethodSpec,
    ModelSpec,
    PerplexitySpec,
    RunSpec,
    ZeroShotSpec,
)
from harness.stored import plan_stored
from harness.zeroshot.tasks import task_data, task_source
from kernels.errors import InputError, did_you_mean
from methods import create_method
from methods.registry import method_names
from methods.validation import validated


class NothingToMeasureError(InputError):
    """None of the texts or tasks of an experiment can be had on this machine."""


@dataclass(frozen=True)
class Choices:
    """What the user asked for; None leaves it to the profile or the experiment."""

    profile: str = "auto"
    models: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    corpora: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    windows: int | None = None
    limit: int | None = None  # examples of a zero-shot task; 0 for all
    budgets: tuple[float, ...] = ()  # bits per weight, for the rows that have one each
    divergence: bool = False
    context: int | None = None
    calibration_samples: int | None = None
    calibration_corpus: str | None = None
    dtype: str | None = None
    device: str | None = None
    seed: int = 0
    reparameterize: bool = False
    synthetic: bool = False  # random weights of the model's shapes, where speed and memory are measured
    elsewhere: bool = False  # runs go to other machines, whose devices cannot be looked at from here

    def suited_to(self, experiment: Experiment) -> Choices:
        """These choices less those that mean nothing to `experiment`: for many experiments under one command line."""
        known = {name for row in experiment.with_budgets(self.budgets).rows for name in row.names}
        methods = tuple(method for method in self.methods if method in known)
        if self.methods and not methods:
            raise NothingToMeasureError(f"{experiment.name} has no row of {', '.join(self.methods)}")
        if experiment.decode:
            return replace(self, methods=methods, corpora=(), windows=None, divergence=False, tasks=(), limit=None)
        if experiment.metric == "accuracy":
            return replace(self, methods=methods, corpora=(), windows=None, divergence=False, synthetic=False)
        return replace(self, methods=methods, tasks=(), limit=None, synthetic=False)


@dataclass
class Plan:
    """The table, and the runs to carry out, the unquantized reference of each model before the others.

    references: for each run's key the key of the unquantized run under the same protocol.
    """

    table: TablePlan
    runs: list[RunSpec] = field(default_factory=list)
    references: dict[str, str] = field(default_factory=dict)


def choose_profile(name: str, gpu: bool | None = None) -> str:
    """ "auto" becomes "paper" on a machine with a GPU that reaches the hub, and "embedded" elsewhere.

    gpu: whether there is one, where runs go to other machines.
    """
    if name != "auto":
        load_profile(name)
        return name
    gpu = torch.cuda.is_available() if gpu is None else gpu
    return "paper" if gpu and hub_allowed("auto") else "embedded"


def plan_table(experiment: Experiment, choices: Choices) -> Plan:
    """All runs of `experiment`. Raises InputError for an unknown model, method, option, corpus or profile.

    Nothing is downloaded for the paper's models that are not run; the models that are run are resolved now.
    """
    experiment = experiment.with_budgets(choices.budgets)
    profile_name = choose_profile(choices.profile, choices.device == "cuda" if choices.elsewhere else None)
    profile = load_profile(profile_name)
    # With "auto" a corpus may still come from the hub when the models do not.
    sources = choices.profile if choices.profile != "auto" or profile_name == "embedded" else profile_name
    names = tuple(dict.fromkeys(choices.models)) or _models_of(experiment, profile)
    rows = _chosen_rows(experiment, choices.methods)
    evaluations, remarks = _evaluations(experiment, choices, profile, sources)
    # Calibration text is a means, not a result: the embedded profile takes its own sample even where the hub is there.
    calibration = _calibration(choices, profile, profile_name)
    planned: list[PlannedRow] = []
    plan = Plan(TablePlan(experiment.name, experiment.item, experiment.title, experiment.metric, ("?",), ()))
    for name in names:
        model, family = _model_spec(name, choices, profile, experiment)
        if stored := None if choices.synthetic else plan_stored(model, evaluations):
            plan.runs.append(stored.run)
            planned.append(stored.row)
            if not stored.can_be_quantized:
                continue
        reference = None
        if evaluations:  # what runs are compared by; speed and memory stand for themselves
            reference = _run_spec(UNQUANTIZED, {}, model, family, None, evaluations)
            plan.runs.append(reference)
        for row in rows:
            if row.method not in method_names():
                planned.append(_row(row, name, None, "method not registered"))
                continue
            if row.runtime.get("runtime") == "banded" and model.device == "cpu":
                planned.append(_row(row, name, None, "not run: weights in bands need a CUDA device"))
                continue
            measured = (*evaluations, *_runtime_evaluations(experiment, row, choices.synthetic))
            options = {**profile.options.get(row.method, {}), **row.options}
            seeded = calibration if row.seed is None else calibration.model_copy(update={"seed": row.seed})
            spec = _run_spec(row.method, options, model, family, seeded, measured)
            if spec.key not in {run.key for run in plan.runs}:
                plan.runs.append(spec)
            if reference is not None:
                plan.references[spec.key] = reference.key
            planned.append(_row(row, name, spec.key, _row_note(row, family, profile.options.get(row.method, {}))))
    for name in experiment.models:
        if name.lower() not in {choice.lower() for choice in names}:
            planned += [_row(row, name, None, f"not run: profile {profile_name}") for row in rows]
    plan.table = TablePlan(
        name=experiment.name,
        item=experiment.item,
        title=experiment.title,
        metric=experiment.metric,
        datasets=_datasets(experiment, choices),
        rows=tuple(planned),
        notes=(f"Profile: {profile_name}.", *remarks, *experiment.notes),
        figures=experiment.figures,
    )
    return plan


def _models_of(experiment: Experiment, profile: Profile) -> tuple[str, ...]:
    """The experiment's models; where the profile replaces those of the papers, still those that are here already."""
    if profile.models == "paper":
        return experiment.models
    here = (name for name in experiment.models if is_local(name))
    return tuple(dict.fromkeys(here)) or profile.models


def plan_quantization(name: str, method: str, options: dict[str, Any], choices: Choices) -> RunSpec:
    """A run that quantizes model `name` and measures nothing. Raises InputError as `plan_table` does."""
    profile_name = choose_profile(choices.profile)
    profile = load_profile(profile_name)
    model, family = _model_spec(name, choices, profile)
    require_unquantized(resolve_model(name))
    calibration = _calibration(choices, profile, profile_name)
    return _run_spec(method, {**profile.options.get(method, {}), **options}, model, family, calibration, ())


def _datasets(experiment: Experiment, choices: Choices) -> tuple[str, ...]:
    """What the table is about, as the claims call it: corpora, or tasks."""
    if experiment.metric == "accuracy":
        return choices.tasks or experiment.tasks
    if experiment.decode:
        return ("decode",)
    return tuple(dataset_name(corpus) for corpus in choices.corpora or experiment.corpora)


def _chosen_rows(experiment: Experiment, methods: tuple[str, ...]) -> list[Row]:
    known = {row.method for row in experiment.rows}
    names = {name for row in experiment.rows for name in row.names}
    for method in methods:
        if method in names:
            continue
        name, _, setting = method.partition(" ")
        if setting and name in known:
            settings = ", ".join(repr(row.setting) for row in experiment.rows if row.method == name)
            raise InputError(f"{name} has no row {setting!r} in {experiment.name}; it has {settings}")
        if name in method_names():
            raise InputError(f"method {name!r} has no row in {experiment.name}; it has {', '.join(sorted(known))}")
        raise InputError(f"unknown method {name!r}" + did_you_mean(name, known))
    return [row for row in experiment.rows if not methods or row.names & set(methods)]


def _model_spec(
    name: str, choices: Choices, profile: Profile, experiment: Experiment | None = None
) -> tuple[ModelSpec, str]:
    device = chosen_device(choices.device, choices.elsewhere)
    # A GPU-less machine computes in half precision at a crawl or not at all; what it decodes with is 16 bits wide.
    on_cpu = "bfloat16" if experiment is not None and experiment.decode else "float32"
    dtype = choices.dtype or (on_cpu if device == "cpu" else profile.dtype)
    if choices.synthetic:
        catalogued(name)  # raises for a model whose shapes are not known
        return validated(ModelSpec, {"name": name, "dtype": dtype, "device": device}, "model"), catalogue()[name].family
    source = resolve_model(name)
    values = {
        "name": source.name,
        "dtype": dtype,
        "device": device,
        "reparameterize": choices.reparameterize,
        "seed": choices.seed if choices.reparameterize else 0,
        "content": planned_content(source),
    }
    return validated(ModelSpec, values, "model"), source.family


def _evaluations(
    experiment: Experiment, choices: Choices, profile: Profile, sources: str
) -> tuple[tuple[EvaluationSpec, ...], tuple[str, ...]]:
    """What every run measures, and what the caption must say of what cannot be measured here."""
    if choices.synthetic and not experiment.decode:
        raise InputError(f"--synthetic is for tables of speed and memory; {experiment.name} measures quality")
    if experiment.metric == "accuracy":
        return _task_evaluations(experiment, choices, profile, sources)
    if experiment.decode:
        if choices.tasks or choices.corpora or choices.divergence or (choices.limit, choices.windows) != (None, None):
            raise InputError(
                "--corpus, --windows, --divergence, --tasks and --limit are for tables of quality; "
                f"{experiment.name} measures speed"
            )
        return (), ()
    if choices.tasks or choices.limit is not None:
        raise InputError(f"--tasks and --limit are for zero-shot tables; {experiment.name} measures perplexity")
    corpora, absent = _corpora_here(experiment, choices, sources)
    shown: dict[str, str] = {}
    for corpus in corpora:
        if shown.setdefault(dataset_name(corpus), corpus) != corpus or corpora.count(corpus) > 1:
            other = shown[dataset_name(corpus)]
            raise InputError(
                f"corpora {other!r} and {corpus!r} have one name in the table; rename one, or leave it out"
            )
    windows = choices.windows if choices.windows is not None else profile.windows
    context = 2048 if choices.context is None else choices.context
    specs: list[EvaluationSpec] = []
    kinds: tuple[type[PerplexitySpec] | type[DivergenceSpec], ...] = (PerplexitySpec,)
    for kind in (*kinds, DivergenceSpec) if choices.divergence else kinds:
        for corpus in corpora:
            found = resolve_corpus(corpus, sources, "test")
            values = {
                "corpus": found,
                "context": context,
                "windows": windows,
                "content": local_checksum(found, "test"),
            }
            specs.append(validated(kind, values, f"evaluation on {corpus!r}"))
    return tuple(specs), (f"Not measured, no text here: {', '.join(absent)}.",) if absent else ()


def _runtime_evaluations(experiment: Experiment, row: Row, synthetic: bool) -> tuple[EvaluationSpec, ...]:
    """Speed and memory of a row, where the experiment measures them."""
    if not experiment.decode:
        return ()
    options = {**experiment.decode, **row.runtime, "synthetic": synthetic}
    where = f"{experiment.name}, row {row.setting!r}"
    shared = {name: value for name, value in options.items() if name != "rounds"}
    return validated(DecodeSpec, options, where), validated(MemorySpec, shared, where)


def _corpora_here(experiment: Experiment, choices: Choices, sources: str) -> tuple[tuple[str, ...], list[str]]:
    """The corpora to measure, and those that can be had from nowhere; one that was asked for by name must be here."""
    if choices.corpora:
        return choices.corpora, []
    here, absent, problem = [], [], None
    for corpus in experiment.corpora:
        try:
            resolve_corpus(corpus, sources, "test")
        except InputError as error:
            problem = problem or error
            absent.append(corpus)
        else:
            here.append(corpus)
    if not here:
        raise NothingToMeasureError(str(problem))
    return tuple(here), absent


def _task_evaluations(
    experiment: Experiment, choices: Choices, profile: Profile, sources: str
) -> tuple[tuple[EvaluationSpec, ...], tuple[str, ...]]:
    """The tasks whose documents can be had; a task that was asked for by name must be one of them."""
    if choices.corpora or choices.windows is not None or choices.divergence:
        raise InputError(
            f"--corpus, --windows and --divergence are for tables of perplexity; {experiment.name} measures tasks"
        )
    limit = profile.limit if choices.limit is None else choices.limit or None
    specs, absent = [], []
    for task in choices.tasks or experiment.tasks:
        source = task_source(task, sources)
        if source is None and choices.tasks:
            raise InputError(
                f"task {task!r} is not here: put it below SAGEBENCH_DATA as {find_task(task).local}, "
                "or use --profile paper to fetch it from the hub"
            )
        if source is None:
            absent.append(task)
            continue
        content = task_data(task, source).sha256 if source == "local" else None
        values = {"task": task, "source": source, "limit": limit, "content": content and content[:16]}
        specs.append(validated(ZeroShotSpec, values, f"task {task!r}"))
    if not specs:
        raise NothingToMeasureError(
            f"{experiment.name}: none of its tasks is here ({', '.join(absent)}); set SAGEBENCH_DATA to a folder "
            "with zeroshot/*.jsonl, or use --profile paper to fetch them from the hub"
        )
    return tuple(specs), (f"Not measured, no data here: {', '.join(absent)}.",) if absent else ()


def _calibration(choices: Choices, profile: Profile, sources: str) -> CalibrationSpec:
    corpus = resolve_corpus(choices.calibration_corpus or profile.calibration.corpus, sources, "train")
    samples = choices.calibration_samples
    values = {
        "corpus": corpus,
        "samples": profile.calibration.samples if samples is None else samples,
        "context": profile.calibration.context if choices.context is None else choices.context,
        "seed": choices.seed,
        "content": local_checksum(corpus, "train"),
    }
    return validated(CalibrationSpec, values, "calibration")


def _run_spec(
    method: str,
    options: dict[str, Any],
    model: ModelSpec,
    family: str,
    calibration: CalibrationSpec | None,
    evaluations: tuple[EvaluationSpec, ...],
) -> RunSpec:
    resolved = {key: family if (key, value) == ("preset", "family") else value for key, value in options.items()}
    if calibration is not None and calibration.seed and method != UNQUANTIZED and "seed" not in resolved:
        resolved["seed"] = calibration.seed
    quantizer = create_method(method, **resolved)
    if calibration is not None and quantizer.calibration_corpus is not None:
        calibration = calibration.model_copy(update={"corpus": quantizer.calibration_corpus, "content": None})
    return RunSpec(
        model=model,
        method=MethodSpec(name=method, options=quantizer.config.model_dump(mode="json", exclude_defaults=True)),
        calibration=None if quantizer.needs == "nothing" else calibration,
        evaluations=evaluations,
    )


def _row_note(row: Row, family: str, overrides: dict[str, Any]) -> str:
    """What a reader of the row must know: the settings that were chosen for it, and the row's own note."""
    notes = [f"the paper's settings for the {family} family"] if row.options.get("preset") == "family" else []
    notes += [f"{key}={value} in this profile" for key, value in overrides.items() if key not in row.options]
    return "; ".join([*notes, row.note] if row.note else notes)


def _row(row: Row, model: str, key: str | None, note: str) -> PlannedRow:
    entry = catalogue().get(model.lower())
    claims = entry.claims if entry is not None else None
    return PlannedRow(
        method=row.method,
        setting=row.setting,
        label=row.label,
        model=claims or model,
        # Papers give bit counts for a family: "OPT" of "OPT-1.3B", "LLaMA-2" of "LLaMA-2-7B".
        family=claims.rsplit("-", 1)[0] if claims else None,
        run_key=key,
        note=note,
    )
