from typing import get_args

import pytest

from harness.catalog import models, tasks
from harness.claims import BIT_METRICS, find, load_claims
from harness.experiments import experiment_names, load_experiment, load_profile
from harness.report.figures import DRAWINGS
from harness.spec import UNQUANTIZED
from kernels.errors import InputError
from methods import create_method
from methods.registry import method_names
from methods.sage_x.recipe import Ingredient

# Items of papers; the others are questions of our own.
OF_PAPER = [name for name in experiment_names() if not name.startswith(("front", "mixed-precision", "sage-x"))]


def refused(path):
    with pytest.raises(InputError) as caught:
        load_experiment(str(path))
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    return message


def test_the_shipped_experiments_are_found():
    assert {"table1", "table2", "table4", "slim-llm-table", "mg-ptq-table"} <= set(experiment_names())
    assert "profiles" not in experiment_names()


@pytest.mark.parametrize("name", experiment_names())
def test_a_shipped_experiment_is_valid_and_its_models_are_in_the_catalogue(name):
    experiment = load_experiment(name)
    assert experiment.name == name
    assert set(experiment.models) <= models().keys()
    assert all(models()[model].claims for model in experiment.models if name in OF_PAPER)
    # Of quantization time the unquantized model has none.
    assert experiment.rows[0].method == UNQUANTIZED or experiment.metric == "quantization_minutes"
    assert set(experiment.figures) <= DRAWINGS.keys()


@pytest.mark.parametrize("name", OF_PAPER)
def test_every_row_has_claims_of_that_item(name):
    experiment = load_experiment(name)
    claims = load_claims()
    for row in experiment.rows:
        if row.method == UNQUANTIZED:
            continue
        found = find(claims, item=experiment.item, method=row.method, setting=row.setting)
        assert bool(found) != row.ours, (row.method, row.setting)


@pytest.mark.parametrize("name", OF_PAPER)
def test_every_claim_of_the_item_has_a_row_and_every_model_a_claim(name):
    experiment = load_experiment(name)
    of_item = find(load_claims(), item=experiment.item)
    # Bit counts are printed for a family and not for a model.
    claimed = [claim for claim in of_item if claim.metric not in BIT_METRICS]
    rows = {(row.method, row.setting) for row in experiment.rows}
    assert {(claim.method, claim.setting) for claim in claimed} - rows == set()
    if all(row.ours for row in experiment.rows):  # a paper whose tables could not be read
        assert not claimed
    if claimed:
        assert {claim.model for claim in claimed} == {models()[model].claims for model in experiment.models}


def test_the_mixed_precision_tables_are_one_comparison_at_two_widths():
    two, three = (load_experiment(f"mixed-precision-{bits}bit") for bits in (2, 3))
    assert [row.setting.replace("2", "3", 1) for row in two.rows[1:]] == [row.setting for row in three.rows[1:]]
    for experiment, bits in ((two, 2), (three, 3)):
        rows = experiment.rows[1:]
        assert {row.method for row in rows} == {"gptq", "slim-llm", "slim-llm-plus", "mg-ptq"}
        assert {row.options.get("bits", row.options.get("average_bits")) for row in rows} == {bits}
        assert [row.options["allocator"] for row in rows if "allocator" in row.options] == ["knapsack"]


def test_every_item_of_the_papers_claims_has_an_experiment():
    items = {load_experiment(name).item for name in experiment_names()}
    paper = [claim for claim in load_claims() if claim.source.startswith("arXiv 2606.05429")]
    assert paper
    assert {claim.item for claim in paper} <= items


@pytest.mark.parametrize("name", ["figure3", "figure9"])
def test_an_ablation_changes_one_thing_a_row(name):
    full, *others = (row for row in load_experiment(name).rows if row.method == "sage-ptq")
    seen = [full.options]
    for row in others:
        assert {**full.options, **row.options} not in seen
        assert set(row.options.items()) ^ set(full.options.items()) <= {
            ("group_count", 6), ("threshold", "fixed"), *(("saliency", s) for s in ("none", "hessian", "magnitude")),
        }  # fmt: skip
        seen.append({**full.options, **row.options})


@pytest.mark.parametrize("name", experiment_names())
@pytest.mark.parametrize("family", ["opt", "llama", "qwen"])
def test_every_registered_row_has_options_that_its_method_takes(name, family):
    for row in load_experiment(name).with_budgets(()).rows:
        options = {key: family if value == "family" else value for key, value in row.options.items()}
        if row.method in method_names():
            create_method(row.method, **options)


@pytest.mark.parametrize("name", ["embedded", "paper"])
def test_profiles_are_valid_and_their_options_belong_to_methods(name):
    profile = load_profile(name)
    assert profile.calibration.corpus == "c4"
    for method, options in profile.options.items():
        if method in method_names():
            create_method(method, **options)


def test_table_4_measures_every_task_of_the_paper_and_the_one_that_its_head_names():
    experiment = load_experiment("table4")
    claimed = {claim.dataset for claim in find(load_claims(), item="table 4", metric="accuracy")}
    assert set(experiment.tasks) <= tasks().keys()
    assert set(experiment.tasks) - claimed == {"arc_easy"}
    assert claimed < set(experiment.tasks)
    # The paper's column is headed ARC-e; the claims have its values under what they are.
    of_arc = find(load_claims(), item="table 4", dataset="arc_challenge")
    assert of_arc and all(claim.note == "column headed ARC-e; the values are ARC-challenge" for claim in of_arc)
    assert any("ARC-e that holds ARC-challenge values" in note for note in experiment.notes)


def test_the_front_has_every_method_and_a_row_of_sage_x_for_every_budget_and_mode():
    experiment = load_experiment("front")
    rows = experiment.with_budgets(()).rows
    assert {row.method for row in rows} == set(method_names())
    kinds = {}
    for row in rows:
        if row.method == "sage-x":
            kind = row.options.get("mode"), row.options.get("tuning")
            kinds.setdefault(kind, []).append(row.options["budget"])
    assert kinds == {
        kind: list(experiment.budgets)
        for kind in ((None, None), (None, "model"), ("self-calibrated", None), ("weights-only", None))
    }
    assert len({(row.method, row.setting) for row in rows}) == len(rows)


def test_budgets_of_the_user_replace_those_of_the_experiment(experiment_file):
    row = {"method": "sage-x", "setting": "{budget} bit", "label": "X", "budgets": True, "options": {"seed": 1}}
    plain = {"method": "fp16", "setting": "16 bit", "label": "FP16"}
    experiment = load_experiment(str(experiment_file(rows=[plain, row], budgets=[2.0])))
    rows = experiment.with_budgets((1.6, 3.15)).rows
    assert [(row.setting, row.options) for row in rows] == [
        ("16 bit", {}),
        ("1.6 bit", {"seed": 1, "budget": 1.6}),
        ("3.15 bit", {"seed": 1, "budget": 3.15}),
    ]
    assert [row.setting for row in experiment.with_budgets(()).rows] == ["16 bit", "2 bit"]


def test_budgets_where_no_row_has_one_are_refused(experiment_file):
    with pytest.raises(InputError, match=r"--budgets: no row of .* has a budget"):
        load_experiment(str(experiment_file())).with_budgets((2.0,))


@pytest.mark.parametrize("name", ["slim-llm", "mg-ptq", "slim-llm-opt"])
def test_the_table_of_a_method_may_be_named_by_the_method(name):
    assert load_experiment(name) == load_experiment(f"{name}-table")


def test_an_unknown_profile_gets_a_suggestion():
    with pytest.raises(InputError, match="unknown profile 'embeded'; did you mean 'embedded'"):
        load_profile("embeded")


def test_an_unknown_experiment_gets_a_suggestion():
    with pytest.raises(InputError, match="unknown experiment 'tabel1'; did you mean 'table1'"):
        load_experiment("tabel1")


def test_a_file_is_an_experiment(experiment_file):
    experiment = load_experiment(str(experiment_file()))
    assert [row.method for row in experiment.rows] == ["fp16", "rtn", "gptq"]
    assert experiment.rows[1].options == {"bits": 3, "group_size": 32}


def test_a_missing_file_is_named(tmp_path):
    assert "No such file" in refused(tmp_path / "none.yaml")


def test_an_unknown_key_gets_a_suggestion(experiment_file):
    assert "unknown option 'titel'; did you mean 'title'" in refused(experiment_file(titel="x"))


def test_an_unknown_key_of_a_row_gets_a_suggestion(experiment_file):
    row = {"method": "rtn", "setting": "3 bit", "label": "RTN", "option": {"bits": 3}}
    message = refused(experiment_file(rows=[row]))
    assert "unknown option 'rows.0.option'; did you mean 'options'" in message


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"metric": "speed"}, "metric='speed'"),
        ({"rows": []}, "rows=[]"),
        ({"models": []}, "models=[]"),
        ({"corpora": []}, "corpora=[]: a table of perplexity needs at least one"),
        ({"metric": "accuracy", "corpora": []}, "tasks=[]: a table of accuracy needs at least one"),
        ({"metric": "accuracy", "tasks": ["piqa"]}, "corpora=['wikitext2']: a table of accuracy has none"),
        ({"tasks": ["piqa"]}, "tasks=['piqa']: a table of perplexity has none"),
        ({"rows": [{"method": "rtn", "label": "RTN"}]}, "rows.0.setting is missing"),
        ({"rows": "rtn"}, "rows='rtn'"),
        ({"rows": [{"method": "sage-x", "setting": "x", "label": "X", "budgets": True}]}, "budgets=[]: a row wants"),
        ({"metric": "token_latency_ms"}, "corpora=['wikitext2']: a table of token_latency_ms has none"),
        ({"figures": ["paretto"]}, "unknown figure 'paretto'; did you mean 'pareto'"),
    ],
)
def test_a_bad_value_is_shown(experiment_file, changes, problem):
    assert problem in refused(experiment_file(**changes))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "must hold name, item"),
        (b"- 1", "must hold name, item"),
        (b"name: [", "is not valid YAML"),
        (b"a: &a [*a", "is not valid YAML"),
        (b"!!python/object/apply:os.getcwd []", "is not valid YAML"),
        (b"\xff\xfe\x00\x80", "cannot be read"),
        (b"name: x\x00y", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(tmp_path, content, problem):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert problem in refused(path)


def test_the_ablation_leaves_out_each_ingredient_of_sage_x_from_a_row_that_is_there_too():
    rows = [dict(row.options) for row in load_experiment("sage-x-ablation").rows if row.method == "sage-x"]
    left_out = [options.pop("without", []) for options in rows]
    assert sorted(name for names in left_out for name in names) == sorted(get_args(Ingredient))
    whole = [options for options, names in zip(rows, left_out, strict=True) if not names]
    assert all(options in whole for options in rows)
