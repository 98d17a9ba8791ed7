import json

import datasets
import documents
import pytest
from documents import TASKS
from lm_eval.tasks import TaskManager

from harness.catalog import tasks
from harness.zeroshot import tasks as module
from harness.zeroshot.tasks import load_task, stock_file, task_data, task_source, write_task_file
from kernels.errors import InputError


def asked(task):
    """All that a task asks, in order: contexts, continuations, their numbers, and the right answers."""
    task.build_all_requests(limit=None, rank=0, world_size=1)
    requests = [(one.doc_id, one.idx, one.request_type, one.args) for one in task.instances]
    targets = [task.doc_to_target(document) for _, document in task.doc_iterator(rank=0, limit=None, world_size=1)]
    return requests, targets


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_DATA", str(documents.write(tmp_path / "data", *TASKS)))
    return tmp_path / "data"


@pytest.fixture
def hub(monkeypatch):
    """The hub's data sets, in memory: the documents under the split that is scored, others in the other splits."""
    stock = datasets.load_dataset

    def load(path, name=None, **more):
        if path == "json":
            return stock(path, name, **more)
        asked_for.append((path, name))
        (task,) = [task for task in TASKS if (path, name) == hub_name(task)]
        scored = tasks()[task].split
        splits = {split: documents.documents(task, 3, seed=9) for split in ("train", "validation", "test")}
        if task in ("piqa", "boolq", "winogrande", "hellaswag"):
            splits.pop("test")
        splits[scored] = documents.documents(task)
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    asked_for = []
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked_for


def hub_name(task):
    return {
        "piqa": ("baber/piqa", None), "boolq": ("aps/super_glue", "boolq"),
        "openbookqa": ("allenai/openbookqa", "main"), "winogrande": ("allenai/winogrande", "winogrande_xl"),
        "arc_easy": ("allenai/ai2_arc", "ARC-Easy"), "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
        "hellaswag": ("Rowan/hellaswag", None),
    }[task]  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_local_documents_are_asked_exactly_as_the_stock_task_asks_them(name, data, hub):
    local = load_task(task_data(name, "local"))
    assert hub == []
    stock = TaskManager(include_defaults=False).load([str(stock_file(name))])["tasks"][name]
    assert hub == [hub_name(name)]
    requests, targets = asked(local)
    assert (requests, targets) == asked(stock)
    assert len({request[0] for request in requests}) == len(targets) == 12
    assert len(requests) == 12 * tasks()[name].choices
    assert len(set(map(str, targets))) > 1
    assert (local.VERSION, list(local._metric_fn_list)) == (stock.VERSION, list(stock._metric_fn_list))


def test_the_hub_source_is_the_stock_task_itself(hub, monkeypatch):
    monkeypatch.setattr(module, "require_hub", lambda *_: None)
    task = load_task(task_data("piqa", "hub"))
    assert hub == [("baber/piqa", None)]
    assert len(task.eval_docs) == 12


def test_other_documents_are_asked_otherwise(data):
    before = asked(load_task(task_data("piqa", "local")))
    path = data / "zeroshot" / "piqa.jsonl"
    path.write_text(path.read_text().replace("w1 ", "w7 "))
    assert asked(load_task(task_data("piqa", "local"))) != before


def test_the_catalogue_is_what_the_design_lists_and_what_the_harness_has():
    assert set(tasks()) == set(TASKS)
    for name in TASKS:
        assert stock_file(name).is_file()


def test_a_task_file_changes_nothing_but_the_data(data, tmp_path):
    path = write_task_file(task_data("piqa", "local"), tmp_path)
    text = path.read_text()
    assert "doc_to" not in text and "metric" not in text
    assert f"include: {stock_file('piqa')}" in text


def test_nothing_is_left_in_the_user_s_own_cache(data, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "own")
    assert len(load_task(task_data("hellaswag", "local")).eval_docs) == 12
    assert not (tmp_path / "own").exists()


def test_local_files_come_first_then_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_DATA", str(documents.write(tmp_path, "piqa")))
    assert task_source("piqa", "embedded") == "local"
    assert task_source("boolq", "embedded") is None
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert task_source("boolq", "paper") == "hub"
    assert task_source("piqa", "paper") == "local"


def test_an_unknown_task_gets_a_suggestion():
    with pytest.raises(InputError, match="unknown zero-shot task 'arc_esay'; did you mean 'arc_easy'"):
        task_source("arc_esay", "embedded")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "has no documents"),
        ("\n\n", "has no documents"),
        ('{"goal": "a"}\n', "line 1: no field 'sol1'; it must have goal, sol1, sol2, label"),
        (json.dumps(documents.documents("piqa", 1)[0]) + "\n[]\n", "line 2: no field 'goal'"),
        ("{", "line 1: not JSON"),
    ],
)
def test_damaged_documents_are_named_by_line(content, problem, tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_DATA", str(documents.write(tmp_path, "piqa")))
    (tmp_path / "zeroshot" / "piqa.jsonl").write_text(content)
    with pytest.raises(InputError) as caught:
        task_data("piqa", "local")
    assert problem in str(caught.value)
    assert "piqa.jsonl" in str(caught.value)


def test_missing_documents_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"task 'piqa': no file zeroshot/piqa.jsonl below SAGEBENCH_DATA="):
        task_data("piqa", "local")
    with pytest.raises(InputError, match=r"task 'piqa' comes from the hub .* zeroshot/piqa.jsonl below SAGEBENCH_DATA"):
        task_data("piqa", "hub")
