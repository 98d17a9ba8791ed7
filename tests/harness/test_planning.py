import documents
import pytest
import tiny

from harness.experiments import Experiment, Row, load_experiment
from harness.planning import Choices, choose_profile, plan_table
from kernels.errors import InputError
from methods import create_method


@pytest.fixture
def experiment(tiny_folder):
    return Experiment(
        name="small", item="table 1", title="Small", metric="perplexity", corpora=("wikitext2",), models=("opt-1.3b",),
        rows=(
            Row(method="gptq", setting="3 bit", label="GPTQ", options={"bits": 3, "group_size": 32}),
            Row(method="fp16", setting="16 bit", label="FP16"),
            Row(method="not-there", setting="1 bit", label="NOT-THERE"),
            Row(method="sage-ptq", setting="n_lut 4", label="SAGE-PTQ", options={"preset": "family"}),
        ),
    )  # fmt: skip


@pytest.fixture
def choices(tiny_folder, corpus_file):
    """Choices of the tiny model and text, with more on top."""

    def choose(**more):
        base = {
            "profile": "embedded", "models": (str(tiny_folder),), "corpora": (str(corpus_file),), "context": 32,
            "calibration_corpus": str(corpus_file), "device": "cpu",
        }  # fmt: skip
        return Choices(**{**base, **more})

    return choose


def test_the_unquantized_reference_runs_first_and_every_run_refers_to_it(experiment, choices):
    plan = plan_table(experiment, choices())
    assert [spec.method.name for spec in plan.runs] == ["fp16", "gptq", "sage-ptq"]
    assert set(plan.references) == {spec.key for spec in plan.runs}
    assert set(plan.references.values()) == {plan.runs[0].key}
    assert all(spec.evaluations == plan.runs[0].evaluations for spec in plan.runs)


def test_the_reference_runs_even_where_its_row_was_not_asked_for(experiment, choices):
    plan = plan_table(experiment, choices(methods=("gptq",)))
    assert [spec.method.name for spec in plan.runs] == ["fp16", "gptq"]
    assert {row.method for row in plan.table.rows} == {"gptq"}


def test_one_row_of_a_method_is_chosen_by_its_setting(experiment, choices):
    other = Row(method="gptq", setting="2 bit", label="GPTQ", options={"bits": 2, "group_size": 32})
    more = experiment.model_copy(update={"rows": (*experiment.rows, other)})
    plan = plan_table(more, choices(methods=("gptq 2 bit",)))
    assert [spec.method.options.get("bits") for spec in plan.runs] == [None, 2]
    assert {row.setting for row in plan.table.rows} == {"2 bit"}
    assert choices(methods=("gptq 2 bit", "rtn")).suited_to(more).methods == ("gptq 2 bit",)


def test_only_methods_that_need_text_have_calibration(experiment, choices):
    by_name = {spec.method.name: spec for spec in plan_table(experiment, choices(calibration_samples=5)).runs}
    assert by_name["fp16"].calibration is None
    assert by_name["sage-ptq"].calibration is None
    assert (by_name["gptq"].calibration.samples, by_name["gptq"].calibration.context) == (5, 32)


def test_a_method_that_calibrates_on_the_model_s_own_text_gets_it_whatever_the_user_chose(experiment, choices):
    rows = tuple(
        Row(method="sage-x", setting=mode, label="X", options={"mode": mode, "budget": 3.0})
        for mode in ("calibrated", "self-calibrated", "weights-only")
    )
    plan = plan_table(experiment.model_copy(update={"rows": rows}), choices(calibration_samples=5))
    theirs, own, nothing = (spec.calibration for spec in plan.runs[1:])
    assert (own.corpus, own.content, own.samples) == ("self", None, 5)
    assert theirs.corpus not in ("self", None)
    assert theirs.content is not None
    assert nothing is None


def test_any_method_can_be_calibrated_on_the_model_s_own_text(experiment, choices):
    plan = plan_table(experiment, choices(calibration_corpus="self"))
    by_name = {spec.method.name: spec for spec in plan.runs}
    assert by_name["gptq"].calibration.corpus == "self"


def test_an_unregistered_method_keeps_its_row_and_says_so(experiment, choices, tiny_folder):
    rows = {(row.method, row.model): row for row in plan_table(experiment, choices()).table.rows}
    row = rows["not-there", str(tiny_folder)]
    assert (row.run_key, row.note) == (None, "method not registered")


def test_models_that_are_not_run_keep_their_rows_under_the_name_of_the_claims(experiment, choices):
    rows = [row for row in plan_table(experiment, choices()).table.rows if row.model == "OPT-1.3B"]
    assert len(rows) == 4
    assert all((row.run_key, row.note, row.family) == (None, "not run: profile embedded", "OPT") for row in rows)


@pytest.mark.parametrize(
    ("family", "preset"), [("llama", "llama"), ("opt", "opt"), ("qwen2", "qwen"), ("gemma2", "llama")]
)
def test_the_family_preset_follows_the_model(experiment, choices, tmp_path, family, preset):
    row = next(row for row in experiment.rows if row.method == "sage-ptq")
    wanted = create_method("sage-ptq", **{**row.options, "preset": preset}).config
    folder = tiny.save(tmp_path / family, family)
    plan = plan_table(experiment, choices(models=(str(folder),)))
    (spec,) = (spec for spec in plan.runs if spec.method.name == "sage-ptq")
    assert create_method("sage-ptq", **spec.method.options).config == wanted
    (planned,) = (planned for planned in plan.table.rows if planned.run_key == spec.key)
    assert f"settings for the {preset} family" in planned.note


def test_options_given_besides_a_preset_survive_the_plan(choices):
    # Both equal the method's general defaults, and must not give way to the preset's 10 neighbours and 10 %.
    options = {"preset": "opt", "neighbors": 5, "max_salient": 0.01}
    rows = (Row(method="sage-ptq", setting="s", label="SAGE", options=options),)
    named = {"name": "n", "item": "table 1", "title": "t", "metric": "perplexity"}
    experiment = Experiment(**named, corpora=("wikitext2",), models=("opt-1.3b",), rows=rows)
    spec = plan_table(experiment, choices()).runs[-1]
    assert create_method("sage-ptq", **spec.method.options).config == create_method("sage-ptq", **options).config


@pytest.mark.parametrize(
    ("methods", "problem"),
    [
        (("gtpq",), "unknown method 'gtpq'; did you mean 'gptq'"),
        (("SAGE_PTQ",), "unknown method 'SAGE_PTQ'; did you mean 'sage-ptq' or 'gptq'"),
        (("rtn",), "method 'rtn' has no row in small; it has fp16, gptq, not-there, sage-ptq"),
        (("gptq 4 bit",), "gptq has no row '4 bit' in small; it has '3 bit'"),
        (("gtpq 3 bit",), "unknown method 'gtpq'; did you mean 'gptq'"),
        (("gptq", "nonsense"), "unknown method 'nonsense'; known: fp16, gptq, not-there, sage-ptq"),
    ],
)
def test_methods_that_are_not_there_get_suggestions(experiment, choices, methods, problem):
    with pytest.raises(InputError) as caught:
        plan_table(experiment, choices(methods=methods))
    assert str(caught.value) == problem + ("?" if "did you mean" in problem else "")


@pytest.mark.parametrize("seed", [0, 1])
def test_no_run_is_planned_twice(experiment, choices, seed):
    twice = experiment.model_copy(
        update={"rows": (*experiment.rows, experiment.rows[0].model_copy(update={"setting": "again"}))}
    )
    plan = plan_table(twice, choices(seed=seed))
    assert [spec.method.name for spec in plan.runs] == ["fp16", "gptq", "sage-ptq"]
    keys = {row.run_key for row in plan.table.rows if row.method == "gptq" and row.run_key}
    assert keys == {plan.runs[1].key}


def test_defaults_that_are_spelled_out_are_the_same_run(experiment, choices):
    rows = tuple(
        Row(method="gptq", setting=setting, label="GPTQ", options={"group_size": 32, **options})
        for setting, options in (("a", {}), ("b", {"bits": 4, "damping": 0.01}))
    )
    plan = plan_table(experiment.model_copy(update={"rows": rows}), choices())
    assert len(plan.runs) == 2
    assert len(plan.table.run_keys) == 1


def test_the_seed_reaches_calibration_and_method(experiment, choices):
    gptq = plan_table(experiment, choices(seed=7)).runs[1]
    assert gptq.calibration.seed == 7
    assert gptq.method.options["seed"] == 7
    assert gptq.model.seed == 0
    moved = plan_table(experiment, choices(seed=7, reparameterize=True)).runs[0]
    assert (moved.model.reparameterize, moved.model.seed) == (True, 7)


def test_a_model_of_the_experiment_is_known_however_its_path_is_spelled(experiment, choices, tmp_path):
    folder = tiny.save(tmp_path / "TinyModel")
    named = experiment.model_copy(update={"models": (str(folder),)})
    plan = plan_table(named, choices(models=(str(folder),)))
    assert len(plan.table.rows) == 4
    assert not any(row.note.startswith("not run") for row in plan.table.rows)


def test_two_models_have_a_reference_each(experiment, choices, tmp_path, tiny_folder):
    other = tiny.save(tmp_path / "opt", "opt")
    plan = plan_table(experiment, choices(models=(str(tiny_folder), str(other)), methods=("gptq",)))
    assert [spec.method.name for spec in plan.runs] == ["fp16", "gptq"] * 2
    assert plan.references[plan.runs[3].key] == plan.runs[2].key


def test_a_model_asked_for_twice_is_run_once(experiment, choices, tiny_folder):
    plan = plan_table(experiment, choices(models=(str(tiny_folder),) * 2, methods=("gptq",)))
    assert len(plan.runs) == 2


def test_texts_that_a_table_cannot_tell_apart_are_refused(experiment, choices, corpus_file, tmp_path):
    twin = tmp_path / corpus_file.name
    twin.write_text(tiny.words(100, seed=1), encoding="utf-8")
    for other in (twin, corpus_file):
        with pytest.raises(InputError, match="have one name in the table; rename one"):
            plan_table(experiment, choices(corpora=(str(corpus_file), str(other))))


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"device": "gpu"}, "device 'gpu' is unknown; use cpu, cuda or cuda:N"),
        ({"windows": 0}, "windows=0: input should be greater than or equal to 1"),
        ({"context": 1}, "context=1: input should be greater than or equal to 2"),
        ({"calibration_samples": 0}, "samples=0: input should be greater than or equal to 1"),
        ({"profile": "papre"}, "unknown profile 'papre'; did you mean 'paper'"),
        ({"corpora": ("wikitext",)}, "unknown corpus 'wikitext'; did you mean 'wikitext2'"),
        ({"calibration_corpus": "c5"}, "unknown corpus 'c5'; known: c4, c4-sample, ptb, wiki-sample, wikitext2"),
        ({"models": ("opt-1.3",)}, "unknown model 'opt-1.3'; did you mean"),
    ],
)
def test_bad_choices_are_named(experiment, choices, more, problem):
    with pytest.raises(InputError) as caught:
        plan_table(experiment, choices(**more))
    assert problem in str(caught.value)


def test_an_unknown_option_of_a_row_gets_a_suggestion(experiment, choices):
    row = Row(method="gptq", setting="s", label="GPTQ", options={"bitz": 3})
    with pytest.raises(InputError, match="method 'gptq': unknown option 'bitz'; did you mean 'bits'"):
        plan_table(experiment.model_copy(update={"rows": (row,)}), choices())


def test_a_device_elsewhere_is_taken_at_its_word(experiment, choices):
    plan = plan_table(experiment, choices(device="cuda", elsewhere=True))
    assert {spec.model.device for spec in plan.runs} == {"cuda"}
    with pytest.raises(InputError, match="device 'gpu' is unknown"):
        plan_table(experiment, choices(device="gpu", elsewhere=True))


def test_auto_is_embedded_without_a_hub():
    assert choose_profile("auto") == "embedded"


def test_the_paper_profile_plans_the_paper_s_models_without_fetching_any(choices):
    plan = plan_table(load_experiment("table1"), choices(profile="paper", models=(), methods=("fp16",)))
    assert [spec.model.name for spec in plan.runs] == list(load_experiment("table1").models)
    assert all(spec.evaluations[0].windows is None for spec in plan.runs)


@pytest.fixture
def tasks_here(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_DATA", str(documents.write(tmp_path / "data", "piqa", "arc_challenge", "arc_easy")))


@pytest.fixture
def for_tasks(choices):
    def choose(**more):
        return choices(**{"corpora": (), "context": None, **more})

    return choose


def test_a_table_of_accuracy_measures_the_tasks_that_are_here_and_names_the_others(for_tasks, tasks_here):
    plan = plan_table(load_experiment("table4"), for_tasks())
    assert [(one.task, one.source, one.limit) for one in plan.runs[0].evaluations] == [
        ("piqa", "local", 200), ("arc_challenge", "local", 200), ("arc_easy", "local", 200),
    ]  # fmt: skip
    assert [spec.method.name for spec in plan.runs] == ["fp16", "gptq", "billm", "sage-ptq"]
    assert plan.table.metric == "accuracy"
    assert "Not measured, no data here: boolq, openbookqa, winogrande, hellaswag." in plan.table.notes
    assert any("ARC-e" in note for note in plan.table.notes)


@pytest.mark.parametrize(("asked", "limit"), [(None, 200), (7, 7), (0, None)])
def test_the_limit_is_the_profile_s_unless_asked_for_and_0_is_all(for_tasks, tasks_here, asked, limit):
    plan = plan_table(load_experiment("table4"), for_tasks(limit=asked, tasks=("piqa",)))
    assert [one.limit for one in plan.runs[0].evaluations] == [limit]


def test_the_paper_profile_scores_every_example_of_the_hub(for_tasks, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    plan = plan_table(load_experiment("table4"), for_tasks(profile="paper", models=(), methods=("fp16",)))
    assert {(one.source, one.limit) for one in plan.runs[0].evaluations} == {("hub", None)}
    assert len(plan.runs[0].evaluations) == 7


def test_divergence_is_measured_on_the_same_windows_as_perplexity(experiment, choices):
    plain, more = (plan_table(experiment, choices(divergence=on, windows=3)).runs[1] for on in (False, True))
    assert [one.metric for one in more.evaluations] == ["perplexity", "divergence"]
    assert more.evaluations[0] == plain.evaluations[0]
    assert (more.evaluations[1].corpus, more.evaluations[1].windows) == (plain.evaluations[0].corpus, 3)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"tasks": ("boolq",)}, "task 'boolq' is not here: put it below SAGEBENCH_DATA as zeroshot/boolq.jsonl"),
        ({"tasks": ("piqqa",)}, "unknown zero-shot task 'piqqa'; did you mean 'piqa'"),
        ({"windows": 3}, "--corpus, --windows and --divergence are for tables of perplexity"),
        ({"divergence": True}, "--corpus, --windows and --divergence are for tables of perplexity"),
        ({"corpora": ("c4",)}, "--corpus, --windows and --divergence are for tables of perplexity"),
    ],
)
def test_bad_choices_for_a_table_of_accuracy_are_named(for_tasks, tasks_here, more, problem):
    with pytest.raises(InputError) as caught:
        plan_table(load_experiment("table4"), for_tasks(**more))
    assert problem in str(caught.value)


@pytest.mark.parametrize("more", [{"tasks": ("piqa",)}, {"limit": 5}])
def test_tasks_mean_nothing_for_a_table_of_perplexity(experiment, choices, more):
    with pytest.raises(InputError, match="--tasks and --limit are for zero-shot tables; small measures perplexity"):
        plan_table(experiment, choices(**more))


def test_without_any_documents_the_way_out_is_named(for_tasks):
    with pytest.raises(InputError, match=r"table4: none of its tasks is here .*; set SAGEBENCH_DATA to a folder"):
        plan_table(load_experiment("table4"), for_tasks())
