import pytest

from harness.experiments import experiment_names
from harness.paper_items import experiment_of, experiments_of_paper
from kernels.errors import InputError


def test_every_numbered_item_is_the_one_that_its_experiment_names():
    known = experiments_of_paper()
    assert set(known.values()) <= set(experiment_names())
    assert [item for item in known if item.startswith("figure")] == [f"figure {n}" for n in range(2, 11)]
    assert {"table 1", "table 2", "table 3", "table 4", "table 6", "table 7"} <= known.keys()
    assert known["figure 6"] == "figure5-7"


def test_tables_stand_before_figures_and_both_by_number():
    items = list(experiments_of_paper())
    order = [(item.startswith("figure"), int(item.split()[1])) for item in items]
    assert order == sorted(order)


def test_an_item_by_number():
    assert experiment_of(3, None) == "table3"
    assert experiment_of(None, 10) == "figure10"
    assert experiment_of(None, None) is None


@pytest.mark.parametrize(
    ("table", "figure", "problem"),
    [(9, None, "table 9 is unknown; known: 1, 2, 3"), (None, 1, "figure 1 is unknown; known: 2, 3")],
)
def test_what_the_paper_does_not_number_is_refused(table, figure, problem):
    with pytest.raises(InputError, match=problem):
        experiment_of(table, figure)
