import errno
import json
import os

import pytest

from harness import environment
from harness.engines import InProcess
from harness.records import RecordStore
from harness.spec import MethodSpec, ModelSpec, PerplexitySpec, RunSpec
from harness.sweep import Reporter, shard, sweep
from kernels.errors import InputError


def spec_of(method):
    evaluations = (PerplexitySpec(corpus="wikitext2"),)
    return RunSpec(model=ModelSpec(name="m"), method=MethodSpec(name=method), calibration=None, evaluations=evaluations)


def measured(method, windows):
    return spec_of(method).model_copy(update={"evaluations": (PerplexitySpec(corpus="c4", windows=windows),)})


FP16, RTN, GPTQ = RUNS = [spec_of(name) for name in ("fp16", "rtn", "gptq")]
REFERENCES = {spec.key: FP16.key for spec in RUNS}


class Worker:
    """Stands in for `runner.run`; raises what it was told to raise for a method."""

    def __init__(self, **errors):
        self.errors = errors
        self.ran = []
        self.references = {}

    def __call__(self, spec, *, reference, fresh, progress):
        name = spec.method.name
        self.ran.append(name)
        self.references[name] = reference and reference["key"]
        progress(1, 1, "working")
        if name in self.errors:
            raise self.errors[name]
        code = environment.code_fingerprint()
        return {
            "spec": {},
            "metrics": [],
            "ledger": {"payload_bits": 3.0},
            "environment": {"code": code},
            "fresh": fresh,
        }


@pytest.fixture
def store(tmp_path):
    return RecordStore(tmp_path / "runs")


def files(store):
    return sorted(path.name for path in store.folder.glob("*"))


def test_all_runs_are_carried_out_in_order_with_their_reference(store):
    worker = Worker()
    outcome = sweep(RUNS, REFERENCES, store, engine=InProcess(worker))
    assert worker.ran == ["fp16", "rtn", "gptq"]
    assert worker.references == {"fp16": None, "rtn": FP16.key, "gptq": FP16.key}
    assert outcome.done == [spec.key for spec in RUNS]
    assert files(store) == sorted(f"{spec.key}.json" for spec in RUNS)


def test_finished_runs_are_skipped_and_untouched(store):
    sweep(RUNS, REFERENCES, store, engine=InProcess(Worker()))
    before = [store.path(spec.key).stat().st_mtime_ns for spec in RUNS]
    worker = Worker()
    outcome = sweep(RUNS, REFERENCES, store, engine=InProcess(worker))
    assert worker.ran == []
    assert (outcome.done, outcome.skipped) == ([], [spec.key for spec in RUNS])
    assert [store.path(spec.key).stat().st_mtime_ns for spec in RUNS] == before


def test_fresh_repeats_finished_runs(store):
    sweep(RUNS, REFERENCES, store, engine=InProcess(Worker()))
    worker = Worker()
    sweep(RUNS, REFERENCES, store, fresh=True, engine=InProcess(worker))
    assert worker.ran == ["fp16", "rtn", "gptq"]
    assert all(store.load(spec.key)["fresh"] for spec in RUNS)


def test_a_failure_is_kept_and_the_others_go_on(store):
    outcome = sweep(RUNS, REFERENCES, store, engine=InProcess(Worker(rtn=RuntimeError("two\nlines"))))
    assert (outcome.done, outcome.failed) == ([FP16.key, GPTQ.key], [RTN.key])
    assert outcome.errors == {RTN.key: "rtn() on m: RuntimeError: two lines"}
    kept = json.loads(store.failure_path(RTN.key).read_text(encoding="utf-8"))
    assert kept["error"] == "RuntimeError: two lines"
    assert "Traceback" in kept["details"]
    assert kept["spec"]["method"]["name"] == "rtn"


def test_a_failed_run_is_tried_again_and_its_failure_forgotten(store):
    sweep(RUNS, REFERENCES, store, engine=InProcess(Worker(rtn=RuntimeError("no"))))
    worker = Worker()
    sweep(RUNS, REFERENCES, store, engine=InProcess(worker))
    assert worker.ran == ["rtn"]
    assert files(store) == sorted(f"{spec.key}.json" for spec in RUNS)


def test_without_its_reference_no_quantized_number_is_kept(store):
    worker = Worker(fp16=RuntimeError("no"))
    outcome = sweep(RUNS, REFERENCES, store, engine=InProcess(worker))
    assert worker.ran == ["fp16"]
    assert outcome.failed == [spec.key for spec in RUNS]
    assert "the unquantized model was not measured" in outcome.errors[RTN.key]


def test_a_fresh_sweep_does_not_compare_with_a_reference_that_just_failed(store):
    sweep(RUNS, REFERENCES, store, engine=InProcess(Worker()))
    outcome = sweep(RUNS, REFERENCES, store, fresh=True, engine=InProcess(Worker(fp16=RuntimeError("no"))))
    assert outcome.failed == [spec.key for spec in RUNS]


def test_bad_input_stops_the_sweep_and_leaves_nothing_of_its_run(store):
    with pytest.raises(InputError, match="bad"):
        sweep(RUNS, REFERENCES, store, engine=InProcess(Worker(rtn=InputError("bad"))))
    assert files(store) == [f"{FP16.key}.json"]


def test_an_interrupt_leaves_finished_runs_and_nothing_else(store):
    with pytest.raises(KeyboardInterrupt):
        sweep(RUNS, REFERENCES, store, engine=InProcess(Worker(rtn=KeyboardInterrupt())))
    assert files(store) == [f"{FP16.key}.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_bad_input_and_other_os_errors_are_failures(store, number):
    full = OSError(number, os.strerror(number), "/some/file")
    with pytest.raises(InputError, match=r"no disk space left \(/some/file\); finished runs are kept"):
        sweep(RUNS, REFERENCES, store, engine=InProcess(Worker(rtn=full)))
    outcome = sweep(RUNS, REFERENCES, store, engine=InProcess(Worker(rtn=OSError(errno.EIO, "Input/output error"))))
    assert outcome.failed == [RTN.key]


def test_records_of_other_code_are_used_with_a_warning(store):
    sweep(RUNS, REFERENCES, store, engine=InProcess(Worker()))
    record = json.loads(store.path(RTN.key).read_text(encoding="utf-8"))
    record["environment"]["code"] = "0" * 16
    store.path(RTN.key).write_text(json.dumps(record), encoding="utf-8")
    outcome = sweep(RUNS, REFERENCES, store, engine=InProcess(Worker()))
    assert outcome.warnings == ["rtn() on m: measured with other code than this; --fresh repeats it"]
    assert outcome.skipped == [spec.key for spec in RUNS]


def test_a_corrupt_record_is_reported_and_run_again(store):
    sweep(RUNS, REFERENCES, store, engine=InProcess(Worker()))
    store.path(RTN.key).write_text("{", encoding="utf-8")
    worker = Worker()
    outcome = sweep(RUNS, REFERENCES, store, engine=InProcess(worker))
    assert worker.ran == ["rtn"]
    (warning,) = outcome.warnings
    assert f"{RTN.key}.json is corrupt" in warning
    assert store.load(RTN.key) is not None


def test_the_reporter_hears_of_every_run(store):
    class Listener(Reporter):
        def __init__(self):
            self.heard = []

        def begin(self, spec, number, total):
            self.heard.append(f"{number}/{total} {spec.method.name}")

        def progress(self, spec, done, total, what):
            self.heard.append(what)

        def end(self, spec, status, record):
            self.heard.append(f"{status} {spec.method.name} {record is not None}")

    sweep(RUNS[:1], REFERENCES, store, engine=InProcess(Worker()))
    listener = Listener()
    sweep(RUNS, REFERENCES, store, listener, engine=InProcess(Worker(gptq=RuntimeError("no"))))
    assert listener.heard == [
        "finished before fp16 True", "2/3 rtn", "working", "done rtn True", "3/3 gptq", "working", "failed gptq False",
    ]  # fmt: skip


def shards(count):
    references = {spec.key: FP16.key for spec in RUNS}
    more = [spec_of(f"m{number}") for number in range(7)]
    references |= {spec.key: FP16.key for spec in more}
    everything = [*RUNS, *more]
    return everything, [shard(everything, references, f"{number}/{count}") for number in range(1, count + 1)]


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_shards_cover_all_runs_and_share_nothing_but_references(count):
    everything, parts = shards(count)
    quantized = [spec.key for part in parts for spec in part if spec != FP16]
    assert sorted(quantized) == sorted(spec.key for spec in everything if spec != FP16)
    for part in parts:
        assert not part or part[0] == FP16 or not [spec for spec in part if spec != FP16]
        assert [spec for spec in everything if spec in part] == part  # in the order of the plan


def test_runs_of_the_same_weights_fall_to_one_shard():
    runs = [measured(f"m{number}", windows) for windows in (1, 2, 3) for number in range(5)]
    parts = [shard(runs, {}, f"{number}/2") for number in (1, 2)]
    methods = [{spec.method.name for spec in part} for part in parts]
    assert not methods[0] & methods[1]
    assert [len(part) for part in parts] == [9, 6]


def test_a_shard_with_nothing_to_compare_runs_nothing():
    _, parts = shards(20)
    assert [len(part) for part in parts].count(0) == 20 - 9


class Overlapping(InProcess):
    """Takes three runs at a time and ends the last one first."""

    slots = 3

    def __init__(self, execute):
        super().__init__(execute)
        self.tasks = []
        self.most = 0

    def start(self, task):
        self.tasks.append(task)
        self.most = max(self.most, len(self.tasks))

    def wait(self, progress):
        self._task = self.tasks.pop()
        return super().wait(progress)


def test_runs_of_the_same_weights_go_one_after_the_other(store):
    runs = [measured(*which) for which in (("fp16", 1), ("fp16", 2), ("rtn", 1), ("rtn", 2), ("gptq", 1))]
    running = []

    class Watched(Overlapping):
        def start(self, task):
            super().start(task)
            running.append([other.spec.method.name for other in self.tasks])

    done = sweep(runs, {}, store, engine=Watched(Worker()))
    assert sorted(done.done) == sorted(spec.key for spec in runs)
    assert max(names.count("rtn") for names in running) == 1
    assert ["fp16", "fp16", "rtn"] in running  # the unquantized model has no weights to make


def test_a_run_that_is_refused_fails_unbegun_and_takes_with_it_what_is_compared_with_it(store):
    found = sweep(RUNS, REFERENCES, store, engine=InProcess(worker := Worker()), refused={RTN.key: "no memory"})
    assert worker.ran == ["fp16", "gptq"]
    assert (found.failed, found.errors) == ([RTN.key], {RTN.key: "rtn() on m: no memory"})
    assert "no memory" in store.failure_path(RTN.key).read_text(encoding="utf-8")
    found = sweep(RUNS, REFERENCES, store, engine=InProcess(Worker()), fresh=True, refused={FP16.key: "no memory"})
    assert found.failed == [FP16.key, RTN.key, GPTQ.key]


def test_runs_wait_for_their_reference_and_then_go_side_by_side(store):
    engine = Overlapping(worker := Worker())
    done = sweep(RUNS, REFERENCES, store, engine=engine)
    assert worker.ran == ["fp16", "gptq", "rtn"]
    assert worker.references == {"fp16": None, "rtn": FP16.key, "gptq": FP16.key}
    assert engine.most == 2
    assert sorted(done.done) == sorted(spec.key for spec in RUNS)


def test_runs_side_by_side_whose_reference_fails_are_not_begun(store):
    engine = Overlapping(worker := Worker(fp16=RuntimeError("no")))
    done = sweep(RUNS, REFERENCES, store, engine=engine)
    assert worker.ran == ["fp16"]
    assert sorted(done.failed) == sorted(spec.key for spec in RUNS)
