import pytest
import tiny

from harness import preflight
from harness.experiments import Experiment, Row
from harness.planning import Choices, plan_table
from harness.preflight import check_memory, check_methods
from harness.records import RecordStore
from kernels.errors import InputError


@pytest.fixture
def plan(tmp_path, corpus_file):
    """Plan one row of `method` on a tiny model of `family`."""

    def make(method="gptq", family="llama", samples=8, **options):
        rows = (Row(method=method, setting="s", label=method, options=options),)
        experiment = Experiment(
            name="small", item="table 1", title="Small", metric="perplexity", corpora=(str(corpus_file),),
            models=(str(tiny.save(tmp_path / family, family)),), rows=rows,
        )  # fmt: skip
        choices = Choices(
            profile="embedded", models=experiment.models, context=32, device="cpu",
            calibration_samples=samples, calibration_corpus=str(corpus_file),
        )  # fmt: skip
        return plan_table(experiment, choices)

    return make


@pytest.fixture
def store(tmp_path):
    return RecordStore(tmp_path / "runs")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shapes_are_checked_from_the_headers_of_every_family(plan, store, family):
    check_methods(plan(family=family, group_size=32), store)
    with pytest.raises(InputError, match=r"method 'gptq', .*: group_size=100 does not fit"):
        check_methods(plan(family=family, group_size=100), store)


def test_a_calibration_set_too_small_is_found_before_any_run(plan, store):
    with pytest.raises(InputError, match="64 tokens for a Hessian of 96 inputs"):
        check_methods(plan(samples=2, group_size=32), store)


def test_a_hub_model_is_left_until_it_is_loaded(store, corpus_file):
    rows = (Row(method="rtn", setting="s", label="RTN", options={"group_size": 100}),)
    experiment = Experiment(
        name="small",
        item="i",
        title="t",
        metric="perplexity",
        corpora=(str(corpus_file),),
        models=("opt-1.3b",),
        rows=rows,
    )
    check_methods(plan_table(experiment, Choices(profile="embedded", models=("opt-1.3b",), device="cpu")), store)


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(preflight, "available_memory", lambda device: 10**6)


def test_a_model_asked_for_that_does_not_fit_is_refused(plan, store, little_memory):
    with pytest.raises(InputError, match=r"fp16\(\) on .* needs about 1\.5 GB of memory, 0\.0 GB are free; --force"):
        check_memory(plan(group_size=32), store, asked_for=True, force=False)


def test_a_model_of_the_experiment_that_does_not_fit_is_left_out_and_its_rows_say_why(plan, store, little_memory):
    planned = plan(group_size=32)
    check_memory(planned, store, asked_for=False, force=False)
    assert planned.runs == []
    assert all(row.run_key is None for row in planned.table.rows)
    assert all(row.note.startswith("not run: needs about 1.5 GB of memory") for row in planned.table.rows)


def test_force_runs_all_the_same(plan, store, little_memory):
    planned = plan(group_size=32)
    check_memory(planned, store, asked_for=True, force=True)
    assert len(planned.runs) == 2


def test_what_is_finished_needs_no_memory(plan, store, little_memory):
    planned = plan(group_size=32)
    for spec in planned.runs:
        store.save(spec.key, {"spec": {}, "metrics": [], "ledger": {"payload_bits": 3.0}, "environment": {}})
    check_memory(planned, store, asked_for=True, force=False)
    assert len(planned.runs) == 2
    with pytest.raises(InputError, match="needs about"):
        check_memory(planned, store, asked_for=True, force=False, fresh=True)
