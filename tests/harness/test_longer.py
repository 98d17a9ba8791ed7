"""A run that measures fewer windows than one before it is not carried out: its record is what it would have been."""

import json
import shutil

import pytest
import tiny

from harness import spec
from harness.cli import reproduce
from harness.records import RecordStore, outcome

ROWS = [
    {"method": "fp16", "setting": "16 bit", "label": "FP16"},
    {"method": "rtn", "setting": "3 bit", "label": "RTN", "options": {"bits": 3, "group_size": 32}},
    {"method": "gptq", "setting": "3 bit", "label": "GPTQ", "options": {"bits": 3, "group_size": 32}},
]


def run(experiment, corpus_file, out, windows, *more):
    """Run the command line for so many windows; None for all."""
    corpus = [] if "--corpus" in more else ["--corpus", str(corpus_file)]
    line = [
        "--experiment", str(experiment), *corpus, "--context", "32", "--profile", "paper",
        "--device", "cpu", "--calibration-samples", "4", "--calibration-corpus", str(corpus_file),
        "--out", str(out), *more,
    ]  # fmt: skip
    assert reproduce(line if windows is None else [*line, "--windows", str(windows)]) == 0


@pytest.fixture(scope="module")
def experiment(tiny_folder, tmp_path_factory):
    return tiny.write_experiment(tmp_path_factory.mktemp("front") / "front.yaml", models=[str(tiny_folder)], rows=ROWS)


@pytest.fixture(scope="module")
def of_five_windows(experiment, corpus_file, tmp_path_factory):
    """What a run of five windows leaves; not to be changed."""
    folder = tmp_path_factory.mktemp("five")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAGEBENCH_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("SAGEBENCH_DATA", raising=False)
        run(experiment, corpus_file, folder / "out", 5)
    return folder


@pytest.fixture
def command(experiment, corpus_file, tmp_path, capsys):
    """Run the command line for so many windows; returns how many runs were carried out, and all that was said."""

    def command(windows, *more, out="out"):
        run(experiment, corpus_file, tmp_path / out, windows, *more)
        said = capsys.readouterr().out
        return said.count("  done: "), said

    return command


@pytest.fixture
def five(of_five_windows, tmp_path):
    """The state after a run of five windows."""
    shutil.copytree(of_five_windows, tmp_path, dirs_exist_ok=True)


def records(folder, windows):
    """Records by method of the runs of so many windows."""
    found = RecordStore(folder / "runs").load_all().values()
    return {
        record["spec"]["method"]["name"]: record
        for record in found
        if record["spec"]["evaluations"][0]["windows"] == windows
    }


def test_fewer_windows_are_taken_from_a_longer_run_and_are_what_a_run_would_have_given(five, command, tmp_path):
    ran, said = command(2)
    assert ran == 0
    assert said.count("has measured what it asks for") == said.count("finished before") == 3
    assert command(2, out="alone")[0] == 3
    taken, alone = records(tmp_path / "out", 2), records(tmp_path / "alone", 2)
    assert taken.keys() == alone.keys() == {"fp16", "rtn", "gptq"}
    longer = records(tmp_path / "out", 5)
    for method, record in taken.items():
        assert outcome(record) == outcome(alone[method])
        assert record["taken_from"] == {key: longer[method][key] for key in ("key", "created")}
        assert record["metrics"][0]["value"] != longer[method]["metrics"][0]["value"]
    assert (tmp_path / "out/tables/small.csv").read_bytes() == (tmp_path / "alone/tables/small.csv").read_bytes()


def test_more_windows_than_were_measured_are_measured(command):
    assert command(2)[0] == 3
    assert command(3)[0] == 3


def test_all_windows_serve_any_number_and_as_many_as_there_are_serve_all(command, tmp_path):
    assert command(None)[0] == 3
    there = records(tmp_path / "out", None)["fp16"]["metrics"][0]["windows_available"]
    assert command(there)[0] == 0
    assert command(there + 1)[0] == 0  # no more than there are
    assert command(there, out="other")[0] == 3
    assert command(None, out="other")[0] == 0


def test_other_weights_texts_and_contexts_are_measured(five, command, tmp_path):
    assert command(2, "--context", "30")[0] == 3
    assert command(2, "--reparameterize")[0] == 3
    assert command(2, "--calibration-samples", "5")[0] == 1  # of GPTQ alone


def test_fresh_measures_again(five, command):
    assert command(2, "--fresh")[0] == 3


def test_without_a_longer_run_of_the_unquantized_model_all_is_measured(five, command, tmp_path):
    RecordStore(tmp_path / "out/runs").path(records(tmp_path / "out", 5)["fp16"]["key"]).unlink()
    assert command(2)[0] == 3


def test_a_dry_run_knows_and_writes_nothing(five, command, tmp_path):
    before = sorted((tmp_path / "out/runs").iterdir())
    said = command(2, "--dry-run")[1]
    assert (said.count("finished"), said.count("to do")) == (3, 1)  # one sum
    said = command(2, "--dry-run", "--fresh")[1]
    assert (said.count("finished"), said.count("to do")) == (0, 4)
    assert sorted((tmp_path / "out/runs").iterdir()) == before


def edited(folder, edit):
    """Change every record below `folder`."""
    for path in (folder / "out/runs").iterdir():
        record = json.loads(path.read_text(encoding="utf-8"))
        edit(record)
        path.write_text(json.dumps(record), encoding="utf-8")


def remove(folder, windows):
    """Forget the runs of so many windows."""
    for record in records(folder / "out", windows).values():
        RecordStore(folder / "out/runs").path(record["key"]).unlink()


EARLY = {
    "a field of another build": lambda record: record["spec"]["model"].update(colour="blue"),
    "no loss of each window": lambda record: record["metrics"][0].pop("window_nll"),
    "no count of windows": lambda record: record["metrics"][0].pop("windows_available"),
    "no warnings": lambda record: record.pop("warnings"),
    "no date": lambda record: record.pop("created"),
    "no data": lambda record: record.update(data=None),
    "a metric more than evaluations": lambda record: record["metrics"].append(record["metrics"][0]),
}


@pytest.mark.parametrize("case", EARLY)
def test_records_of_other_builds_are_passed_over(five, command, tmp_path, case):
    edited(tmp_path, EARLY[case])
    assert command(2)[0] == 3


def test_keys_of_other_rules_answer_nothing(five, command, monkeypatch):
    monkeypatch.setattr(spec, "SPEC_VERSION", spec.SPEC_VERSION + 1)
    assert command(2)[0] == 3


def test_a_run_by_the_code_of_now_is_preferred_and_then_the_newest(five, command, tmp_path):
    other_code = {"environment": {"code": "0" * 16}, "created": "2100-01-01T00:00:00Z"}
    edited(tmp_path, lambda record: record.update(other_code))
    assert command(4, "--fresh")[0] == 3
    assert command(3)[0] == 0
    assert records(tmp_path / "out", 3)["gptq"]["taken_from"]["key"] == records(tmp_path / "out", 4)["gptq"]["key"]
    for windows in (4, 3):
        remove(tmp_path, windows)
    ran, said = command(2)
    assert ran == 0
    assert said.count("measured with other code than this") == 3


def test_what_was_taken_from_a_taken_record_names_the_run_that_measured_it(five, command, tmp_path):
    longer = {name: record["key"] for name, record in records(tmp_path / "out", 5).items()}
    assert command(3)[0] == 0
    remove(tmp_path, 5)
    assert command(2)[0] == 0
    assert {name: record["taken_from"]["key"] for name, record in records(tmp_path / "out", 2).items()} == longer


def test_losses_that_equal_the_unquantized_model_s_are_measured_again(five, command, tmp_path):
    losses = records(tmp_path / "out", 5)["fp16"]["metrics"][0]["window_nll"]
    edited(tmp_path, lambda record: record["metrics"][0].update(window_nll=losses))
    assert command(2)[0] == 2  # and fp16 is taken


def test_each_evaluation_finds_its_own_among_those_of_a_run(command, corpus_file, tmp_path):
    other, words = tmp_path / "other.txt", corpus_file.read_text(encoding="utf-8").split(" ")
    other.write_text(" ".join([*words[100:], *words[:100]]), encoding="utf-8")
    assert command(5, "--corpus", str(other), str(corpus_file))[0] == 3
    assert command(2, "--corpus", str(corpus_file), str(other))[0] == 0
    assert command(2, "--corpus", str(corpus_file), str(other), out="alone")[0] == 3
    taken, alone = records(tmp_path / "out", 2), records(tmp_path / "alone", 2)
    for method, record in alone.items():
        assert outcome(taken[method]) == outcome(record)
        assert len(record["metrics"]) == 2
    assert command(2)[0] == 0  # one of them
    assert command(2, "--divergence")[0] == 3  # never measured


def test_a_checkpoint_of_an_earlier_time_is_made_again(five, command, tmp_path):
    assert command(2, "--save")[0] == 0
    folders = list((tmp_path / "out/checkpoints").iterdir())
    assert len(folders) == 2  # GPTQ and RTN
    for folder in folders:
        (folder / "config.json").write_text("{}", encoding="utf-8")
    remove(tmp_path, 2)
    assert command(2, "--save")[0] == 0
    assert all(len((folder / "config.json").read_text(encoding="utf-8")) > 2 for folder in folders)


def test_a_task_takes_what_its_own_share_asks_for(five, command, tmp_path):
    assert command(2, "--shard", "1/2")[0] == 0
    assert len(records(tmp_path / "out", 2)) == 2  # its method, and the unquantized model
