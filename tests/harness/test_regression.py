"""The regression gate, on a tiny trained model with a baseline of its own; and on the real one with
`SAGEBENCH_BASELINE=results/baselines/smollm2.json pytest tests/harness/test_regression.py`."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import dying
import flips
import pytest
import tiny
import trained
from filelock import FileLock

from harness import regression
from harness.cli import check_regression
from harness.regression import Baseline, Check, Entry, load_baseline
from kernels.errors import InputError
from methods.registry import builtin_method_names, register_method

_ROOT = Path(__file__).resolve().parents[2]
REAL = os.environ.get("SAGEBENCH_BASELINE")
# Fewer bits than in other tests: a model this small stands three without harm, and so stands a fault in spending them.
OPTIONS = {
    **tiny.OPTIONS,
    "rtn": {"bits": 2, "group_size": 32},
    "gptq": {"bits": 2, "group_size": 32},
    "awq": {"bits": 2, "group_size": 32, "search_tokens": 64},
    "cmpq": {"average_bits": 2.0},
    "mg-ptq": {"group_size": 32, "average_bits": 2.0, "steps": 20},
    "slim-llm": {"bits": 2, "group_size": 16},
    "slim-llm-plus": {"bits": 2, "group_size": 16, "epochs": 5, "learning_rate": 0.05},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A baseline of every method of this project, measured once for all workers; its numbers are not to be changed."""
    if REAL:
        return load_baseline(_ROOT / REAL)
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "gate"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "baseline.json").exists():
            regression.save_baseline(folder / "baseline.json", measure_baseline(folder))
    return load_baseline(folder / "baseline.json")


def measure_baseline(folder):
    text = folder / "text.txt"
    text.write_text(trained.sentences(250), encoding="utf-8")
    content = {
        "protocol": {
            "model": {"name": str(trained.save(folder / "trained"))},
            "calibration": {"corpus": str(text), "samples": 8, "context": 32},
            "evaluation": {"corpus": str(text), "context": 32, "windows": 16},
            "threads": 1,
        },
        "methods": {name: {"options": options} for name, options in OPTIONS.items()},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAGEBENCH_CACHE", str(folder))
        patch.setattr(regression, "_OTHER_THREADS", ())
        return regression.update(Baseline.model_validate_json(json.dumps(content)))


@pytest.fixture
def baseline(measured, tmp_path, monkeypatch):
    """Its file."""
    if REAL:  # the real model lies in the machine's own cache
        monkeypatch.delenv("SAGEBENCH_CACHE")
    path = tmp_path / "tiny.json"
    regression.save_baseline(path, measured)
    return path


def gate(baseline, *more):
    return check_regression(["--baseline", str(baseline), *more])


def change(path, method, **values):
    content = json.loads(path.read_text(encoding="utf-8"))
    content["methods"][method].update(values)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_every_method_of_this_project_has_a_baseline_that_it_meets(baseline, tmp_path, capsys):
    assert load_baseline(baseline).methods.keys() == set(builtin_method_names())
    assert gate(baseline, "--junit", str(tmp_path / "gate.xml")) == 0
    assert "CHANGED" not in capsys.readouterr().out
    suite = ElementTree.parse(tmp_path / "gate.xml").getroot()
    assert suite.attrib["name"] == "sagebench tiny"
    assert (suite.attrib["tests"], suite.attrib["failures"]) == (str(len(suite)), "0")
    assert sorted(case.attrib["name"] for case in suite) == builtin_method_names()


@pytest.mark.parametrize("method", builtin_method_names())
def test_one_rule_flipped_in_a_copy_of_a_method_does_not_pass_the_gate(baseline, monkeypatch, capsys, method):
    assert method in flips.RULES, f"add a rule of {method!r} to flip in tests/harness/flips.py"
    flips.flip(monkeypatch, method)
    code = gate(baseline, "--methods", method)
    (verdict,) = re.findall(rf"^{method}: .*perplexity .* (worse|better) than", capsys.readouterr().out, re.MULTILINE)
    # The perplexity alone must tell: a flip that changes the payload would fail the gate anyhow, and one that does the
    # model good would only warn.
    assert (code, verdict) == (1, "worse")


def test_a_problem_is_said_in_the_table_in_words_and_in_xml(baseline, tmp_path, capsys):
    change(baseline, "rtn", perplexity=1.0, payload_bits=2.0)
    assert gate(baseline, "--methods", "rtn", "--junit", str(tmp_path / "gate.xml")) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "CHANGED" in said
    assert "worse than 1, 0.20% is noise; payload is" in said
    assert "must be 2.0; if that is meant: --update" in said
    (case,) = ElementTree.parse(tmp_path / "gate.xml").getroot()
    assert case.find("failure").attrib["message"] in said


def test_a_better_perplexity_is_a_warning(baseline, tmp_path, capsys):
    change(baseline, "rtn", perplexity=1e6)
    assert gate(baseline, "--methods", "rtn", "--junit", str(tmp_path / "gate.xml")) == 0
    assert "better than 1e+06" in capsys.readouterr().out
    (case,) = ElementTree.parse(tmp_path / "gate.xml").getroot()
    assert case.find("failure") is None
    assert "to hold on to it: --update" in case.find("system-out").text


def test_two_workers_give_what_one_gives_in_the_same_order(measured):
    names = ["rtn", "fp16", "gptq"]
    alone, together = regression.check(measured, names), regression.check(measured, names, workers=2)
    assert [replace(check, seconds=0.0) for check in together] == [replace(check, seconds=0.0) for check in alone]


def test_a_process_that_dies_is_a_problem_of_its_method_alone(measured, tmp_path, monkeypatch):
    dying.install(tmp_path / "plugin", monkeypatch)
    to_die = dying.deaths(tmp_path / "deaths", 2, monkeypatch)  # beside another method, and alone
    entries = {**measured.methods, "dying": Entry(options={"group_size": 32}, perplexity=1.0, payload_bits=1.0)}
    found = regression.check(measured.model_copy(update={"methods": entries}), ["dying", "fp16"], workers=2)
    assert not list(to_die.iterdir())
    assert [check.method for check in found] == ["dying", "fp16"]
    assert found[0].problem == "failed: its process died (the system does that when memory runs out)"
    assert found[1].problem is None


@pytest.mark.parametrize(
    ("more", "said"), [(["0"], "--workers 0: must be at least 1"), (["2", "--update"], "measured by one process")]
)
def test_workers_that_cannot_be_are_refused(baseline, capsys, more, said):
    assert gate(baseline, "--workers", *more) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("more", [("--junit", "FILE/x.xml"), ("--junit", "FOLDER"), ("--update",)])
def test_what_cannot_be_written_is_refused_before_anything_is_measured(baseline, capsys, monkeypatch, tmp_path, more):
    def measured(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(regression, "_measure", measured)
    (tmp_path / "file").write_text("")
    if more == ("--update",):
        monkeypatch.setattr("harness.preflight.TemporaryFile", refusing)
    assert (
        gate(
            baseline, *(part.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path)) for part in more)
        )
        == 2
    )
    assert "cannot be written" in capsys.readouterr().err


def refusing(dir):
    raise PermissionError(13, "Permission denied")


def test_a_perplexity_that_is_no_number_is_a_problem(measured, monkeypatch):
    monkeypatch.setattr(regression, "_measure", lambda name, *rest: (float("nan"), measured.methods[name].payload_bits))
    (found,) = regression.check(measured, ["rtn"])
    assert "perplexity nan" in found.problem


def test_a_method_that_fails_does_not_keep_the_others_from_being_checked(measured, monkeypatch):
    def measure(name, *rest):
        if name == "rtn":
            raise RuntimeError("no\nluck")
        entry = measured.methods[name]
        return entry.perplexity, entry.payload_bits

    monkeypatch.setattr(regression, "_measure", measure)
    found = {check.method: check.problem for check in regression.check(measured, ["rtn", "gptq"])}
    assert found == {"rtn": "failed: RuntimeError: no luck", "gptq": None}


def test_a_checkpoint_that_is_not_the_model_it_was_saved_from_is_a_problem(baseline, monkeypatch, capsys):
    def write(folder, loaded, quantized, record):
        loaded.model.model.norm.weight.mul_(2)
        write_checkpoint(folder, loaded, quantized, record)

    write_checkpoint = regression.write_checkpoint
    monkeypatch.setattr(regression, "write_checkpoint", write)
    assert gate(baseline, "--methods", "rtn") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "SavedError: saved and loaded again, the loss of the first window is" in said


def test_a_registered_method_without_a_baseline_is_a_problem(measured, monkeypatch):
    short = measured.model_copy(update={"methods": {}})
    monkeypatch.setattr(regression, "_measure", None)
    found = regression.check(short, ["rtn"])
    told = "is registered and has no baseline; measure one: --update --methods rtn"
    assert found == [Check("rtn", None, None, None, told)]
    assert [check.method for check in regression.check(short)] == builtin_method_names()


def test_an_update_measures_the_spread_and_adds_what_is_missing(measured, monkeypatch):
    seen = []

    def measure(name, options, protocol, threads):
        seen.append((name, options, threads))
        return {1: 20.0, 2: 20.2, 3: 19.9}[threads], 3.5

    monkeypatch.setattr(regression, "_measure", measure)
    protocol = measured.protocol.model_copy(update={"threads": 2})
    old = Baseline(protocol=protocol, methods={"gptq": Entry(options={"bits": 3}), "gone": Entry()})
    new = regression.update(old)
    assert sorted(new.methods) == builtin_method_names()
    assert [call for call in seen if call[0] == "gptq"] == [("gptq", {"bits": 3}, threads) for threads in (2, 1, 3)]
    gptq = new.methods["gptq"]
    assert (gptq.perplexity, gptq.payload_bits) == (20.2, 3.5)
    assert gptq.tolerance == pytest.approx(3 * 0.014963, rel=1e-3)
    assert new.measured_on[0]["packages"]["torch"]
    only = regression.update(old, ["rtn"])
    assert sorted(only.methods) == ["gptq", "rtn"]
    # A part measured here, the rest elsewhere: both machines are named, each once.
    elsewhere = old.model_copy(update={"measured_on": [{"cpu": "another"}]})
    partly = regression.update(regression.update(elsewhere, ["rtn"]), ["rtn"])
    assert partly.measured_on == [{"cpu": "another"}, *new.measured_on]


def test_another_machine_widens_tolerances_and_keeps_the_numbers(measured, monkeypatch):
    entry = measured.methods["rtn"]
    monkeypatch.setattr(regression, "_measure", lambda *call: (1.01 * entry.perplexity, entry.payload_bits))
    elsewhere = measured.model_copy(update={"measured_on": [{"cpu": "another"}]})
    wide = regression.widen(regression.widen(elsewhere, ["rtn"]), ["rtn"])
    found = wide.methods["rtn"]
    assert (found.perplexity, found.payload_bits) == (entry.perplexity, entry.payload_bits)
    assert found.tolerance == pytest.approx(3 * 0.00995, rel=1e-3)
    assert wide.methods["gptq"] == measured.methods["gptq"]
    assert len(wide.measured_on) == 2


@pytest.mark.parametrize("renew", [regression.update, regression.widen])
def test_a_size_that_depends_on_rounding_is_no_baseline(measured, monkeypatch, renew):
    entry = measured.methods["rtn"]
    monkeypatch.setattr(
        regression, "_measure", lambda *call: (entry.perplexity, entry.payload_bits + 2**-20 * (call[3] == 3))
    )
    with pytest.raises(InputError, match="bits per weight in one run and "):
        renew(measured, ["rtn"])


def test_payload_must_be_equal_to_the_last_bit(measured, monkeypatch):
    entry = measured.methods["rtn"]
    monkeypatch.setattr(regression, "_measure", lambda *call: (entry.perplexity, entry.payload_bits + 2**-20))
    (found,) = regression.check(measured, ["rtn"])
    assert found.problem.startswith("payload is ")


def test_what_was_never_measured_cannot_be_widened(measured):
    with pytest.raises(InputError, match="no numbers to widen; measure them: --update --methods rtn"):
        regression.widen(measured.model_copy(update={"methods": {"rtn": Entry()}}), ["rtn"])


def test_the_checked_in_baseline_covers_every_method():
    found = load_baseline(_ROOT / "results" / "baselines" / "smollm2.json")
    assert found.methods.keys() == set(builtin_method_names())
    assert all(entry.perplexity and entry.payload_bits for entry in found.methods.values())


BAD_BASELINES = {
    "missing": (None, "cannot be read"),
    "not json": ("{", "is not valid JSON"),
    "not an object": ("[]", "baseline"),
    "no protocol": ('{"methods": {}}', "protocol is missing"),
    "another format": ('{"format": 2}', "format=2"),
}


@pytest.mark.parametrize("case", BAD_BASELINES)
def test_a_bad_baseline_is_one_line_and_code_2(tmp_path, capsys, case):
    text, told = BAD_BASELINES[case]
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert gate(path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert told in error


def test_an_unknown_key_of_an_entry_gets_a_suggestion(baseline, capsys):
    change(baseline, "rtn", perplexty=1.0)
    assert gate(baseline) == 2
    assert "unknown option 'methods.rtn.perplexty'; did you mean 'perplexity'?" in capsys.readouterr().err


def test_an_unknown_method_is_named(baseline, capsys):
    assert gate(baseline, "--methods", "rnt") == 2
    assert "unknown method 'rnt'; did you mean 'rtn'?" in capsys.readouterr().err


def test_plugins_need_no_baseline(monkeypatch, measured):
    from methods import registry
    from methods.rtn import Rtn

    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    register_method("somebodys")(type("Somebodys", (Rtn,), {}))
    monkeypatch.setattr(regression, "_measure", lambda name, *rest: (1.0, 1.0))
    assert "somebodys" not in [check.method for check in regression.check(measured)]


def test_a_flip_changes_a_copy_and_nothing_else(monkeypatch):
    before = sys.modules["methods.rtn"].round_to_groups
    with monkeypatch.context() as patch:
        flips.flip(patch, "rtn")
        assert sys.modules["methods.rtn"].round_to_groups is not before
        assert isinstance(sys.modules["methods.grids"], ModuleType)
    assert sys.modules["methods.rtn"].round_to_groups is before
