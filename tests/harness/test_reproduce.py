"""The main job split over machines: what each of them plans, and the README's recipe for it."""

import json
import re
from pathlib import Path

import pytest
import tiny
import yaml

from harness import preflight
from harness.cli import reproduce
from harness.estimate import Estimate
from harness.spec import RunSpec

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def command(tiny_folder, corpus_file, tmp_path):
    rows = [{"method": "fp16", "setting": "16 bit", "label": "FP16"}]
    rows += [
        {"method": "rtn", "setting": f"{bits} bit", "label": "RTN", "options": {"bits": bits, "group_size": 32}}
        for bits in (2, 3, 5, 6)
    ]
    path = tiny.write_experiment(tmp_path / "sweep.yaml", models=[str(tiny_folder)], rows=rows)
    return lambda *more: [
        "--experiment", str(path), "--corpus", str(corpus_file), "--context", "32", "--windows", "2",
        "--profile", "paper", "--device", "cpu", "--out", str(tmp_path / "out"), *more,
    ]  # fmt: skip


def bits_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["spec"]["method"]["options"].get("bits")


def test_tasks_on_machines_of_different_memory_share_one_plan(command, tmp_path, monkeypatch, capsys):
    """One machine has no room for the runs of 3 and 5 bits: they fail there and belong to no other task."""
    cost = {3: 10**18, 5: 10**18}
    monkeypatch.setattr(preflight, "estimate", lambda spec: Estimate(1.0, cost.get(spec.method.options.get("bits"), 1)))
    assert reproduce(command("--shard", "1/2")) == 1
    assert "GB are free; --force runs it all the same" in " ".join(capsys.readouterr().out.split())
    plan = (tmp_path / "out" / "tables" / "small.plan.json").read_bytes()
    cost.clear()  # the other machine
    assert reproduce(command("--shard", "2/2")) == 0
    assert (tmp_path / "out" / "tables" / "small.plan.json").read_bytes() == plan
    runs = list((tmp_path / "out" / "runs").glob("*.json"))
    failed = {bits_of(path) for path in runs if path.name.endswith(".failed.json")}
    done = {bits_of(path) for path in runs if not path.name.endswith(".failed.json")}
    assert failed and failed <= {3, 5}
    assert failed | done == {None, 2, 3, 5, 6}
    assert not failed & done
    assert reproduce(command("--shard", "1/2")) == 0  # requeued where there is room
    assert not list((tmp_path / "out" / "runs").glob("*.failed.json"))


def test_runs_that_do_not_fit_in_memory_are_not_begun(command, tmp_path, monkeypatch):
    cost = {3: 10**18}
    monkeypatch.setattr(preflight, "estimate", lambda spec: Estimate(1.0, cost.get(spec.method.options.get("bits"), 1)))
    assert reproduce(command()) == 0
    assert {bits_of(path) for path in (tmp_path / "out" / "runs").glob("*.json")} == {None, 2, 5, 6}
    assert "not run: needs about" in (tmp_path / "out" / "tables" / "small.md").read_text(encoding="utf-8")


def test_an_option_that_is_given_twice_adds_to_what_was_given(command, capsys):
    methods = ["--methods", "fp16", "--methods", "rtn 3 bit", "--methods", "rtn 5 bit", "--dry-run"]
    assert reproduce(command(*methods)) == 0
    shown = capsys.readouterr().out
    assert [bits for bits in (2, 3, 5, 6) if f"bits={bits}" in shown] == [3, 5]


@pytest.fixture
def on_ray(command, monkeypatch):
    """The command line on a cluster, up to its first run; the runs planned."""

    class Planned(Exception):
        pass

    def stop(runs, *rest, **options):
        raise Planned(runs)

    def plan(*more: str, here: bool = False) -> list[RunSpec]:
        monkeypatch.setattr("torch.cuda.is_available", lambda: here)
        monkeypatch.setattr("harness.reproduce.choose_engine", lambda arguments: None)
        monkeypatch.setattr("harness.reproduce.sweep", stop)
        line = command()
        at = line.index("--device")
        with pytest.raises(Planned) as caught:
            reproduce([*line[:at], *line[at + 2 :], "--engine", "ray", "--address", "auto", *more])
        return caught.value.args[0]

    return plan


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize(
    ("more", "device", "dtype"),
    [
        (["--gpus-per-run", "1"], "cuda", "float16"),
        (["--device", "cuda"], "cuda", "float16"),
        (["--gpus-per-run", "0"], "cpu", "float32"),
        ([], "cpu", "float32"),
    ],
)
def test_what_is_planned_for_a_cluster_is_not_what_this_machine_has(on_ray, more, device, dtype, here):
    models = [spec.model for spec in on_ray(*more, here=here)]
    assert {(model.device, model.dtype) for model in models} == {(device, dtype)}


def test_a_plan_for_gpus_elsewhere_can_be_shown_and_what_needs_one_here_is_refused(command, monkeypatch, capsys):
    ray = ["--engine", "ray", "--address", "auto", "--device", "cuda"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert reproduce(command(*ray, "--dry-run")) == 0
    assert "to do: about" in capsys.readouterr().out
    for more, said in (
        (["--save"], "--save makes checkpoints on this machine, which has no CUDA device"),
        (["--device", "cuda:3"], "--device cuda:3: a run on Ray sees no GPUs but its own"),
    ):
        assert reproduce(command(*ray, *more)) == 2
        assert said in capsys.readouterr().err


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_recipe_for_slurm_is_a_script_and_its_references_are_rows_of_the_grid(command, tmp_path, tiny_folder):
    (script,) = (text for text in blocks("sh") if "#SBATCH" in text)
    assert script.startswith("#!/bin/bash\n#SBATCH")  # sbatch takes no other
    (grid,) = (text for text in blocks("yaml") if "grid:" in text)
    asked = yaml.safe_load(grid)
    path = tiny.write_experiment(tmp_path / "sweep.yaml", **{**asked, "models": [str(tiny_folder)]})
    arguments = ["--experiment", str(path), *command()[2:]]
    (references,) = (
        line for text in blocks("sh") for line in text.splitlines() if "--methods fp16" in line and "srun" in line
    )
    assert reproduce([*arguments, "--dry-run"]) == 0
    assert reproduce([*arguments, "--methods", references.split("--methods ")[1].strip()]) == 0
    assert len(list((tmp_path / "out" / "runs").glob("*.json"))) == 1
