"""Table 5: what is planned for it, on a machine without a GPU and without the paper's model."""

import pytest

from harness.experiments import load_experiment
from harness.planning import Choices, plan_table
from kernels.errors import InputError


def notes(plan, model):
    return [row.note for row in plan.table.rows if row.model == model and row.run_key is None]


def test_each_row_is_run_its_own_way_and_nothing_is_compared(tiny_folder):
    plan = plan_table(load_experiment("table5"), Choices(models=(str(tiny_folder),), device="cpu"))
    assert [[part.metric for part in spec.evaluations] for spec in plan.runs] == [["decode", "memory"]] * 2
    assert [spec.evaluations[0].runtime for spec in plan.runs] == ["dense", "resident"]
    assert {(spec.evaluations[0].prompt, spec.evaluations[0].tokens) for spec in plan.runs} == {(1984, 64)}
    assert {spec.model.dtype for spec in plan.runs} == {"bfloat16"}
    assert plan.references == {}
    assert notes(plan, str(tiny_folder)) == ["method not registered", "not run: weights in bands need a CUDA device"]


def test_synthetic_weights_need_no_download():
    plan = plan_table(load_experiment("table5"), Choices(models=("llama-2-70b",), device="cpu", synthetic=True))
    assert all(part.synthetic for spec in plan.runs for part in spec.evaluations)
    assert {row.model for row in plan.table.rows} == {"LLaMA-2-70B"}


@pytest.mark.parametrize(
    ("name", "choices", "problem"),
    [
        ("table1", {"synthetic": True}, "--synthetic is for tables of speed and memory; table1 measures quality"),
        ("table5", {"synthetic": True, "models": ("llama-2-71b",)}, "no shapes of model 'llama-2-71b'; did you mean"),
        ("table5", {"windows": 3}, "--corpus, --windows, --divergence, --tasks and --limit are for tables of quality"),
    ],
)
def test_choices_that_mean_nothing_here_are_refused(tiny_folder, name, choices, problem):
    with pytest.raises(InputError, match=problem):
        plan_table(load_experiment(name), Choices(**{"models": (str(tiny_folder),), "device": "cpu", **choices}))
