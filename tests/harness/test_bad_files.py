"""Bad files and options that go wrong before or between runs: one line that names the thing, exit code 2, no record."""

import json

import pytest
import tiny
from refusing import refuse
from safetensors.torch import load_file, save_file

from harness.cli import main, reproduce


def experiment(content=None, **changes):
    """A command line whose experiment file has `content`, or the usual one with top-level keys changed."""

    def prepare(place):
        path = tiny.write_experiment(place.folder / "small.yaml", **changes)
        if content is not None:
            path.write_text(content, encoding="utf-8")
        return place.arguments(experiment=path)

    return prepare


def grid(**row):
    """The same with one row, a grid."""
    return experiment(rows=[{"method": "rtn", "setting": "", "label": "RTN", **row}])


def model(change):
    """A command line whose model folder `change` has damaged."""

    def prepare(place):
        change(place.model)
        return place.arguments()

    return prepare


def config(**changes):
    """The same with keys of config.json changed."""

    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

    return model(change)


def write(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def index_of(*shards):
    return write("model.safetensors.index.json", json.dumps({"weight_map": dict(enumerate(shards))}))


def transposed(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].T.contiguous()
    save_file(tensors, file, {"format": "pt"})


def text_file(content):
    def prepare(place):
        place.text.write_text(content, encoding="utf-8")
        return place.arguments()

    return prepare


def same_name(place):
    other = place.folder / "other" / place.text.name
    other.parent.mkdir()
    other.write_text(tiny.words(100), encoding="utf-8")
    return [*place.arguments(corpus=None), "--corpus", str(place.text), str(other)]


RUNS = {
    # many runs at once
    "no workers": (lambda p: p.arguments("--workers", "0"), "--workers 0: must be 1 or more"),
    "workers that are no number": (lambda p: p.arguments("--workers", "two"), "'two'", "--help"),
    "no threads": (lambda p: p.arguments("--threads", "0"), "--threads 0: must be 1 or more"),
    "negative retries": (lambda p: p.arguments("--retries", "-1"), "--retries -1: must be 0 or more"),
    "shard beyond the last": (lambda p: p.arguments("--shard", "3/2"), "--shard '3/2'", "such as 1/4"),
    "shard zero": (lambda p: p.arguments("--shard", "0/2"), "--shard '0/2'", "from 1 to n"),
    "shard without a slash": (lambda p: p.arguments("--shard", "2"), "--shard '2'", "must be i/n"),
    "unknown engine": (lambda p: p.arguments("--engine", "slurm"), "'slurm'", "ray"),
    "ray without an address": (lambda p: p.arguments("--engine", "ray"), "needs --address", "host:port"),
    "ray with local workers": (
        lambda p: p.arguments("--engine", "ray", "--address", "auto", "--workers", "2"), "--workers is for",
    ),
    "address without ray": (lambda p: p.arguments("--address", "auto"), "--address goes with --engine ray"),
    "gpus without ray": (lambda p: p.arguments("--gpus-per-run", "1"), "--gpus-per-run goes with --engine ray"),
    "memory without ray": (lambda p: p.arguments("--memory-per-run", "4"), "--memory-per-run goes with --engine ray"),
    # the command line
    "methods without a name": (lambda p: p.arguments("--methods"), "--methods", "--help"),
    "tasks of a perplexity table": (lambda p: p.arguments("--tasks", "piqa"), "--tasks and --limit", "perplexity"),
    "negative limit": (lambda p: p.arguments("--limit", "-2"), "--limit -2", "must be 1 or more"),
    "both a table and an experiment": (lambda p: p.arguments("--table", "1"), "--table", "not allowed with"),
    "two corpora of one name": (same_name, "have one name in the table"),
    "windows that are no number": (lambda p: p.arguments(windows="all"), "'all'", "--help"),
    "a model that is a folder of nothing": (
        lambda p: p.arguments(model=(p.folder / "nothing").mkdir() or p.folder / "nothing"), "has no config.json",
    ),
    "results below a file": (lambda p: p.arguments(out=p.text / "results"), "--out", "cannot be written"),
    # experiment files
    "empty file": (experiment(""), "must hold name, item"),
    "not yaml": (experiment("rows: ["), "is not valid YAML"),
    "yaml that builds objects": (experiment("!!python/object/apply:os.system [ls]"), "is not valid YAML"),
    "unknown key": (experiment(row=[]), "unknown option 'row'", "did you mean 'rows'"),
    "rows missing": (experiment("{name: a, item: b, title: c, metric: perplexity, models: [m]}"), "rows is missing"),
    "a file that is a list": (experiment("[1, 2]"), "must hold name, item"),
    "no rows": (experiment(rows=[]), "rows"),
    "a row without a method": (experiment(rows=[{"setting": "s", "label": "RTN"}]), "rows.0.method is missing"),
    "a row with an unknown key": (experiment(rows=[{**tiny.ROW, "lable": "R"}]), "'rows.0.lable'", "'label'"),
    "a name that is a path": (experiment(name="../../x"), "name='../../x'"),
    "unknown metric": (experiment(metric="speed"), "metric='speed'"),
    "the same row twice": (experiment(rows=2 * [tiny.ROW]), "two rows for method, setting, model"),
    "options that are no mapping": (experiment(rows=[{**tiny.ROW, "options": [3]}]), "rows.0.options=[3]"),
    "grid that is a list": (grid(grid=["bits"]), "rows.0.grid=['bits']", "must give options lists of values"),
    "grid of one value": (grid(grid={"bits": 3}), "rows.0.grid.bits=3", "must be a list of values"),
    "grid without values": (grid(grid={"bits": []}), "rows.0.grid.bits=[]", "must be a list of values"),
    "grid beside its option": (grid(grid={"bits": [3]}, options={"bits": 2}), "'bits' stands under both"),
    "grid of an unknown option": (grid(grid={"bitz": [3]}), "'bitz'", "did you mean 'bits'?"),
    "grid with a value out of range": (grid(grid={"bits": [3, 99]}), "bits=99", "less than or equal to 8"),
    "negative seeds": (experiment(seeds=[0, -1]), "seeds=[0, -1]", "whole numbers from 0"),
    "one seed": (experiment(seeds=3), "seeds=3", "must be a list"),
    "a folder called yaml": (
        lambda p: p.arguments(experiment=(p.folder / "a.yaml").mkdir() or p.folder / "a.yaml"), "cannot be read",
    ),
    # models
    "folder without a config": (model(lambda folder: (folder / "config.json").unlink()), "has no config.json"),
    "config that is not json": (model(write("config.json", "{")), "config.json is not valid JSON"),
    "config that is a list": (model(write("config.json", "[]")), "config.json is not valid JSON", "not an object"),
    "model that is quantized": (config(quantization_config={"bits": 4}), "is quantized by 'unknown'", "GGUF"),
    "tokenizer that is damaged": (model(write("tokenizer.json", '{"model": {"type": "?"}}')), "cannot be loaded"),
    "tokenizer without settings": (model(write("tokenizer_config.json", "[]")), "cannot be loaded"),
    "unknown architecture": (config(model_type="nonsense"), "cannot be loaded", "nonsense"),
    "architecture with code of its own": (
        config(model_type="theirs", auto_map={"AutoConfig": "theirs.Config"}), "cannot be loaded",
    ),
    "missing shard": (model(index_of("model.safetensors", "gone.safetensors")), "shard gone.safetensors is missing"),
    "shard outside the folder": (model(index_of("../model.safetensors")), "'../model.safetensors'", "the same folder"),
    "absolute shard": (model(index_of("/etc/x.safetensors")), "'/etc/x.safetensors'", "in the same folder"),
    "pickled shard": (model(index_of("pytorch_model.bin")), "'pytorch_model.bin'", "must be a .safetensors file"),
    "index that is not json": (model(write("model.safetensors.index.json", "{")), "index.json is damaged"),
    "index without names": (model(write("model.safetensors.index.json", "{}")), "index.json is damaged"),
    "tensor of another shape": (model(transposed), "up_proj.weight is [64, 96]", "says [96, 64]"),
    "weights that are text": (model(write("model.safetensors", "weights")), "not a readable safetensors file"),
    "gguf that is text": (
        lambda p: p.arguments(model=p.gguf.write_text("GGUF", encoding="utf-8") and p.gguf), "not a readable GGUF file",
    ),
    "model that is a text file": (lambda p: p.arguments(model=p.text), "unknown model", "a folder, a .gguf file"),
    # corpora
    "empty text": (text_file(""), "0 tokens, less than one window"),
    "text of words that the tokenizer lacks": (text_file("w1 w2\n"), "2 tokens, less than one window"),
    "corpus that is a folder": (lambda p: p.arguments(corpus=p.folder / "gone.txt"), "no such text file"),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_bad_input_of_a_run(place, capsys, case):
    prepare, *told = RUNS[case]
    refuse(capsys, reproduce, prepare(place), *told, out=place.out)


def plan(place, **changes):
    """A saved plan with keys changed, as `report` reads it."""
    row = {
        "method": "rtn",
        "setting": "s",
        "label": "RTN",
        "model": "m",
        "family": None,
        "run_key": "0" * 16,
        "note": "",
    }
    content = {"format": 1, "name": "small", "item": "table 1", "title": "t", "metric": "perplexity",
               "datasets": ["wikitext2"], "rows": [{**row, **changes.pop("row", {})}], "notes": []}  # fmt: skip
    path = place.out / "tables" / "small.plan.json"
    path.parent.mkdir(parents=True)
    path.write_text(changes.pop("text", None) or json.dumps({**content, **changes}), encoding="utf-8")
    return ["report", "--out", str(place.out)]


def compare(*keys):
    return lambda place: ["compare", *keys, "--out", str(place.out)]


SAVED = {
    "plan that is cut short": (lambda p: plan(p, text='{"format": 1, "na'), "small.plan.json", "is not JSON"),
    "plan of another version": (lambda p: plan(p, format=99), "format=99", "must be 1"),
    "plan with an unknown key": (lambda p: plan(p, nmae="x"), "unknown key 'nmae'", "did you mean 'name'"),
    "plan whose name is a path": (lambda p: plan(p, name="../../x"), "name='../../x'", "letters, digits"),
    "plan whose key is a path": (lambda p: plan(p, row={"run_key": "../../secret"}), "run_key='../../secret'"),
    "key that is a path": (compare("../../secret", "0" * 16), "key '../../secret'", "letters, digits"),
    "key of no run": (compare("1" * 16, "2" * 16), "no finished run '1111111111111111'", "known: 0000000000000000"),
    "one key": (compare("0" * 16), "KEY", "--help"),
    "table that was not run": (lambda p: ["report", "--table", "1", "--out", str(p.out)], "no plan of table1"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAVED)
def test_bad_input_of_what_was_saved(place, capsys, case):
    prepare, *told = SAVED[case]
    refuse(capsys, main, prepare(place), *told, out=place.out)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("SAGEBENCH_DATA", "/no/such/folder", "SAGEBENCH_DATA=/no/such/folder is not a folder"),
        ("SAGEBENCH_CACHE_GB", "much", "SAGEBENCH_CACHE_GB='much'; it must be a number of gigabytes"),
        ("SAGEBENCH_CACHE_GB", "-1", "SAGEBENCH_CACHE_GB='-1'"),
    ],
)
def test_bad_variables(place, capsys, monkeypatch, name, value, told):
    monkeypatch.setenv(name, value)
    arguments = place.arguments(corpus="wikitext2") if name == "SAGEBENCH_DATA" else place.arguments()
    refuse(capsys, reproduce, arguments, told, out=place.out)


def test_a_text_that_changes_after_planning_is_not_measured_under_the_old_key(place, capsys, monkeypatch):
    from harness import reproduce as module

    check = module.check_methods

    def change_then_check(*arguments, **options):
        check(*arguments, **options)
        place.text.write_text(tiny.words(1000, seed=5), encoding="utf-8")

    monkeypatch.setattr(module, "check_methods", change_then_check)
    refuse(capsys, reproduce, place.arguments(), str(place.text), "planned with", "plan again", out=place.out)
