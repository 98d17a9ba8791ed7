import pytest
import yaml

from harness.experiments import load_experiment
from harness.experiments.grid import expand
from harness.planning import Choices, plan_table
from kernels.errors import InputError

GRID = {"method": "gptq", "setting": "grid", "label": "GPTQ", "options": {"damping": 0.02}}


def rows(**content):
    return expand({"rows": [{**GRID, **content.pop("row", {})}], **content}, "x.yaml")["rows"]


def test_a_grid_is_every_combination_in_order():
    found = rows(row={"grid": {"bits": [2, 3], "group_size": [32, -1]}})
    assert [row["options"] for row in found] == [
        {"damping": 0.02, "bits": bits, "group_size": size} for bits in (2, 3) for size in (32, -1)
    ]
    assert [row["setting"] for row in found] == [
        "grid bits=2 group_size=32", "grid bits=2 group_size=-1",
        "grid bits=3 group_size=32", "grid bits=3 group_size=-1",
    ]  # fmt: skip
    assert all("grid" not in row for row in found)


def test_the_unquantized_model_has_no_seed():
    content = {"rows": [{"method": "fp16", "setting": "16 bit"}, GRID], "seeds": [0, 1]}
    assert [row["setting"] for row in expand(content, "x.yaml")["rows"]] == ["16 bit", "grid seed=0", "grid seed=1"]


def test_seeds_multiply_rows_and_name_themselves():
    found = rows(seeds=[0, 7], row={"grid": {"bits": [2, 3]}})
    assert [(row["setting"], row["seed"]) for row in found] == [
        ("grid bits=2 seed=0", 0), ("grid bits=2 seed=7", 7), ("grid bits=3 seed=0", 0), ("grid bits=3 seed=7", 7),
    ]  # fmt: skip


def test_a_file_without_grids_is_left_alone():
    content = {"rows": [dict(GRID)], "name": "n"}
    assert expand(content, "x.yaml") == content
    assert expand({"rows": "rtn"}, "x.yaml") == {"rows": "rtn"}


@pytest.mark.parametrize("grid", [[], {}, 3, {"bits": 3}, {"bits": []}, {"damping": [0.1]}])
def test_what_is_no_grid_is_refused_by_row(grid):
    with pytest.raises(InputError, match=r"x\.yaml: rows\.0"):
        rows(row={"grid": grid})


def test_one_file_plans_methods_options_models_and_seeds(tmp_path, tiny_folder, corpus_file):
    content = {
        "name": "grid", "item": "grid", "title": "A grid", "metric": "perplexity", "corpora": [str(corpus_file)],
        "models": [str(tiny_folder)], "seeds": [0, 1],
        "rows": [
            {"method": "gptq", "setting": "", "label": "GPTQ", "grid": {"bits": [2, 3], "group_size": [16, 32]}},
            {"method": "rtn", "setting": "", "label": "RTN", "grid": {"bits": [2, 3]}},
        ],
    }  # fmt: skip
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    choices = Choices(
        profile="embedded", context=32, calibration_samples=8, calibration_corpus=str(corpus_file), device="cpu"
    )
    plan = plan_table(load_experiment(str(path)), choices)
    # The models of the file are local: the profile does not replace them.
    assert {spec.model.name for spec in plan.runs} == {str(tiny_folder)}
    assert len(plan.table.rows) == 2 * 4 + 2 * 2
    assert len({row.run_key for row in plan.table.rows}) == len(plan.table.rows)
    gptq = [spec for spec in plan.runs if spec.method.name == "gptq"]
    assert sorted(spec.calibration.seed for spec in gptq) == [0] * 4 + [1] * 4
    assert {spec.method.options.get("seed", 0) for spec in plan.runs} == {0, 1}
