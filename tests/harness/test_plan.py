import dataclasses
import json

import pytest

from harness.plan import PlannedRow, TablePlan
from kernels.errors import InputError

ROW = PlannedRow("gptq", "3 bit g128", "GPTQ", "toy-model", "OPT", "abc123", "")
UNRUN = PlannedRow("awq", "3 bit g128", "AWQ", "toy-model", None, None, "method not registered")
PLAN = TablePlan("table1", "table 1", "Perplexity ± error", "perplexity", ("wikitext2", "c4"), (ROW, UNRUN), ("a",))


def changed(**changes):
    """The JSON of PLAN with top-level keys replaced; a change to ... removes the key."""
    data = json.loads(PLAN.to_json()) | changes
    return json.dumps({key: value for key, value in data.items() if value is not ...})


def changed_row(**changes):
    row = {**dataclasses.asdict(ROW), **changes}
    return changed(rows=[{key: value for key, value in row.items() if value is not ...}])


def test_json_round_trip_gives_an_equal_plan():
    assert TablePlan.from_json(PLAN.to_json()) == PLAN


def test_a_saved_plan_loads_equal_and_saves_the_same_bytes(tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "sub" / "second.json"
    PLAN.save(first)
    TablePlan.load(first).save(second)
    assert TablePlan.load(second) == PLAN
    assert first.read_bytes() == second.read_bytes()


def test_notes_may_be_left_out():
    assert TablePlan.from_json(changed(notes=...)).notes == ()


def test_run_keys_are_listed_once_in_row_order():
    other = dataclasses.replace(ROW, setting="2 bit g128", run_key="000")
    same = dataclasses.replace(ROW, setting="4 bit g128")
    assert dataclasses.replace(PLAN, rows=(ROW, other, UNRUN, same)).run_keys == ("abc123", "000")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        (changed(format=2), "format=2, must be 1"),
        (changed(format=...), "format=None"),
        (changed(titel="x"), "unknown key 'titel'; did you mean 'title'"),
        (changed(item=...), "missing item"),
        (changed(title=""), "title=''"),
        (changed(metric=3), "metric=3"),
        (changed(name="../table1"), "name='../table1'"),
        (changed(datasets=[]), "datasets is empty"),
        (changed(datasets="wikitext2"), "datasets must be a list"),
        (changed(datasets=[1]), "datasets=(1,)"),
        (changed(rows={}), "rows must be a list"),
        (changed(rows=["gptq"]), "row 1 must be a JSON object"),
        (changed_row(bits=3), "row 1: unknown key 'bits'"),
        (changed_row(note=...), "row 1: missing note"),
        (changed_row(note=None), "note=None"),
        (changed_row(model=""), "model=''"),
        (changed_row(family=""), "family=''"),
        (changed_row(run_key="a --> b"), "run_key='a --> b'"),
        (changed(rows=[dataclasses.asdict(ROW)] * 2), "two rows for"),
    ],
)
def test_a_bad_plan_is_refused_and_the_message_names_what_is_wrong(text, problem):
    with pytest.raises(InputError) as caught:
        TablePlan.from_json(text)
    assert problem in str(caught.value)


def test_load_names_the_file(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("{", encoding="utf-8")
    for path in (bad, tmp_path / "absent.json"):
        with pytest.raises(InputError, match=path.name):
            TablePlan.load(path)
