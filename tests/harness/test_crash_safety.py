"""Kill a run, fill its disk, cut its files short: nothing is silently wrong, and the next start completes it.

SAGEBENCH_CRASHES sets how often; the default is a sample that takes seconds. `SAGEBENCH_CRASHES=50 pytest
tests/harness/test_crash_safety.py` is the whole of it.
"""

import errno
import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import killing
import pytest
import tiny
from safetensors import safe_open

from harness import quantized_cache
from harness.cli import reproduce
from harness.quantized_cache import QuantizedEntry
from harness.records import outcome
from kernels import atomic

CRASHES = int(os.environ.get("SAGEBENCH_CRASHES", "3"))
# Blocks enough that a random moment often falls between two of them.
MODEL_BLOCKS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    configuration = tiny.config("llama")
    configuration.num_hidden_layers = MODEL_BLOCKS
    return tiny.save(tmp_path_factory.mktemp("six-blocks"), model=type(tiny.build())(configuration))


@pytest.fixture
def place(model, corpus_file, tmp_path, monkeypatch):
    """A command line of its own cache and results in `folder`: FP16 and GPTQ on six blocks."""

    class Place:
        def __init__(self, name):
            self.folder = tmp_path / name
            self.out, self.cache = self.folder / "results", self.folder / "cache"
            self.folder.mkdir()
            self.environment = {"SAGEBENCH_CACHE": str(self.cache), "HF_HUB_OFFLINE": "1"}
            self.arguments = [
                "--experiment", str(tiny.write_experiment(self.folder / "small.yaml")), "--methods", "gptq",
                "--model", str(model), "--corpus", str(corpus_file), "--calibration-corpus", str(corpus_file),
                "--context", "32", "--calibration-samples", "8", "--windows", "4", "--device", "cpu",
                "--out", str(self.out),
            ]  # fmt: skip

        def run(self):
            monkeypatch.setenv("SAGEBENCH_CACHE", str(self.cache))
            return reproduce(self.arguments)

        def outcomes(self):
            """What the records say, by method, timings apart."""
            found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.out.glob("runs/*.json"))]
            return {record["spec"]["method"]["name"]: outcome(record) for record in found}

        def record(self, method="gptq"):
            (path,) = (p for p in self.out.glob("runs/*.json") if f'"{method}"' in p.read_text(encoding="utf-8"))
            return path

        def checkpoints(self):
            return sorted(path for path in self.cache.glob("quantized/*/*") if path.is_file())

    return Place


@pytest.fixture
def whole(place):
    """An undisturbed run."""
    undisturbed = place("whole")
    assert undisturbed.run() == 0
    return undisturbed


def check_completed(crashed, whole):
    """The next start completes what is there, and the result is that of the undisturbed run."""
    for path in crashed.out.glob("runs/*.json"):
        json.loads(path.read_text(encoding="utf-8"))  # whatever has a record's name is whole
    assert crashed.run() == 0
    assert crashed.outcomes() == whole.outcomes()
    assert not list(crashed.out.glob("runs/*.corrupt"))


def test_a_run_killed_at_a_random_moment_is_completed_bit_for_bit(place, whole):
    first = place("first")
    killing.start(first.arguments, first.environment, die_at=1).join(
        killing.PATIENCE
    )  # the server imports everything once
    undisturbed = place("timed")
    begun = time.monotonic()
    child = killing.start(undisturbed.arguments, undisturbed.environment)
    child.join(killing.PATIENCE)
    assert child.exitcode == 0
    duration = time.monotonic() - begun
    assert undisturbed.outcomes() == whole.outcomes()  # another process, the same bits
    draw = random.Random(0)
    killed = tries = 0
    while killed < CRASHES and tries < 10 * CRASHES:
        tries += 1
        crashed = place(f"killed-{tries}")
        child = killing.start(crashed.arguments, crashed.environment)
        time.sleep(draw.uniform(0, duration))
        child.kill()
        child.join(killing.PATIENCE)
        if child.exitcode == -9:
            killed += 1
        else:  # it was faster than the one that was timed
            duration *= 0.8
        check_completed(crashed, whole)
        shutil.rmtree(crashed.folder)
    assert killed == CRASHES


def some_writes():
    """Numbers of a run's writes: plan, FP16's record; weights, log and activations of each block; the mark.

    First among them: between a block's log and its activations, its weights and its log, and before the mark.
    """
    first = [5, 7, 2 + 3 * MODEL_BLOCKS]
    rest = [number for number in range(1, 2 + 3 * MODEL_BLOCKS + 4) if number not in first]
    random.Random(1).shuffle(rest)
    return [*first, *rest][:CRASHES]


def test_a_run_killed_at_any_of_its_writes_goes_on_from_there(place, whole):
    restored = set()
    for number in some_writes():
        crashed = place(f"write-{number}")
        child = killing.start(crashed.arguments, crashed.environment, die_at=number)
        child.join(killing.PATIENCE)
        assert child.exitcode in (-9, 0)
        check_completed(crashed, whole)
        quantization = json.loads(crashed.record().read_text(encoding="utf-8"))["quantization"]
        restored.add(quantization.get("restored_blocks", MODEL_BLOCKS))
        shutil.rmtree(crashed.folder)
    assert max(restored) > 0


def test_the_time_of_interrupted_runs_counts(place, whole):
    crashed = place("timed")
    child = killing.start(crashed.arguments, crashed.environment, die_at=14)
    child.join(killing.PATIENCE)
    (folder,) = crashed.cache.glob("quantized/*")
    spent = [json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in sorted(folder.glob("block-*.json"))]
    check_completed(crashed, whole)
    record = json.loads(crashed.record().read_text(encoding="utf-8"))
    restored = record["quantization"]["restored_blocks"]
    assert 0 < restored <= len(spent)
    assert record["phases"]["quantize"]["seconds"] > sum(spent[:restored])


def full_disk_at(number):
    """Stands in for Path.replace: the disk is full when the file with this number is to take its name."""
    replace, count = Path.replace, [0]

    def counted(path, target):
        count[0] += 1
        if count[0] >= number:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return replace(path, target)

    return counted


def test_a_disk_that_fills_up_at_any_write_keeps_what_is_finished(place, whole, monkeypatch, capsys):
    for number in some_writes():
        crashed = place(f"full-{number}")
        with monkeypatch.context() as patch:
            patch.setattr(atomic.Path, "replace", full_disk_at(number))
            capsys.readouterr()
            assert crashed.run() == 2
        said = capsys.readouterr().err
        assert re.fullmatch(r"error: no disk space left \(.*\); finished runs are kept\n", said), said
        assert not list(crashed.folder.rglob("*.part"))
        check_completed(crashed, whole)
        shutil.rmtree(crashed.folder)


@pytest.mark.parametrize("finished", [False, True])
def test_weights_of_another_machine_are_neither_continued_nor_used(place, monkeypatch, finished):
    moved = place("moved")
    if finished:
        assert moved.run() == 0
        moved.record().unlink()
    else:
        killing.start(moved.arguments, moved.environment, die_at=14).join(killing.PATIENCE)
    (begun,) = moved.cache.glob("quantized/*")
    monkeypatch.setattr(quantized_cache, "cpu_name", lambda: "another processor")
    assert moved.run() == 0
    quantization = json.loads(moved.record().read_text(encoding="utf-8"))["quantization"]
    assert (quantization["from_cache"], quantization["restored_blocks"]) == (False, 0)
    assert quantization["key"] != begun.name
    assert begun.exists()  # for the machine that it is of


def what_counts(checkpoints):
    """Of an interrupted run's files the activations and the blocks in front of them. A block behind them was not
    finished in time: it is made again and nobody reads what there is of it."""
    (stream,) = (path for path in checkpoints if path.name == "stream.safetensors")
    with safe_open(stream, framework="pt") as opened:
        finished = int(opened.metadata()["blocks"])
    assert finished >= 2
    return [stream, *(path for number in range(finished) for path in checkpoints if f"{number:05d}" in path.name)]


def test_files_cut_short_are_named_and_made_again(place, whole, capsys, caplog):
    draw = random.Random(3)
    for number in range(min(CRASHES, 20)):
        cut = place(f"cut-{number}")
        unfinished = number % 2
        if unfinished:
            killing.start(cut.arguments, cut.environment, die_at=draw.randrange(9, 20)).join(killing.PATIENCE)
            files = what_counts(cut.checkpoints())
        else:
            assert cut.run() == 0
            files = [*cut.checkpoints(), *cut.out.glob("runs/*.json")]
        victim = draw.choice(files)
        content = victim.read_bytes()
        victim.write_bytes(content[: draw.randrange(len(content.rstrip()))])
        if not unfinished and victim.parent.name != "runs":
            cut.record().unlink()  # what the cut weights are for
        capsys.readouterr()
        caplog.clear()
        assert cut.run() == 0
        said = " ".join((caplog.text + capsys.readouterr().out).split())
        name = victim.name if victim.parent.name == "runs" else victim.parent.name
        assert name in said, (victim, said)
        assert re.search("damaged|corrupt", said)
        assert cut.outcomes() == whole.outcomes()
        shutil.rmtree(cut.folder)


def test_the_same_spec_gives_the_same_record_twice(place):
    first, second = place("first"), place("second")
    assert first.run() == second.run() == 0
    assert first.outcomes() == second.outcomes()
    assert first.outcomes()["gptq"]["environment"]["threads"] == 1
    texts = [
        re.sub(r'"(created|seconds|peak_\w+)": .*', "", path.record().read_text(encoding="utf-8"))
        for path in (first, second)
    ]
    assert texts[0] == texts[1]  # byte for byte, whatever `outcome` leaves out


def test_a_fresh_run_does_not_continue_an_interrupted_one(place, whole):
    crashed = place("fresh")
    killing.start(crashed.arguments, crashed.environment, die_at=14).join(killing.PATIENCE)
    crashed.arguments.append("--fresh")
    check_completed(crashed, whole)
    assert json.loads(crashed.record().read_text(encoding="utf-8"))["quantization"]["restored_blocks"] == 0


def test_checkpoints_are_no_larger_than_weights_and_one_set_of_activations(place):
    crashed = place("size")
    killing.start(crashed.arguments, crashed.environment, die_at=17).join(killing.PATIENCE)
    names = [path.name for path in crashed.checkpoints()]
    assert names.count("stream.safetensors") == 1
    assert crashed.run() == 0
    assert "stream.safetensors" not in [path.name for path in crashed.checkpoints()]
    (folder,) = crashed.cache.glob("quantized/*")
    assert QuantizedEntry(folder.name).folder.name == folder.name
