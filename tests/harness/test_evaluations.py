"""Runs of a tiny model with every kind of evaluation, from the spec to the record."""

import shutil

import documents
import pytest

from harness import evaluations, runner
from harness.cache import cache_folder, folder_bytes
from harness.evaluations import gap, same_as_reference
from harness.runner import NoOpError, run
from harness.spec import DivergenceSpec, MethodSpec, ModelSpec, PerplexitySpec, RunSpec, ZeroShotSpec
from kernels.errors import InputError


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_DATA", str(documents.write(tmp_path / "data", "piqa", "arc_easy")))
    return tmp_path / "data"


@pytest.fixture
def spec(tiny_folder, corpus_file, data):
    text = {"corpus": str(corpus_file), "context": 32, "windows": 3}
    every = (
        PerplexitySpec(**text), DivergenceSpec(**text), ZeroShotSpec(task="piqa", source="local", limit=8),
        ZeroShotSpec(task="arc_easy", source="local"),
    )  # fmt: skip

    def make(method="fp16", evaluations=every, dtype="float32", **options):
        return RunSpec(
            model=ModelSpec(name=str(tiny_folder), dtype=dtype), method=MethodSpec(name=method, options=options),
            calibration=None, evaluations=evaluations,
        )  # fmt: skip

    return make


def with_key(record, key="k"):
    return {"key": key, **record}


def test_a_run_measures_all_that_its_spec_asks_in_that_order(spec):
    reference = with_key(run(spec()))
    record = run(spec("rtn", bits=3, group_size=32), reference=reference)
    kinds = [(entry["metric"], entry["dataset"]) for entry in record["metrics"]]
    assert kinds == [("perplexity", "story"), ("divergence", "story"), ("zeroshot", "piqa"), ("zeroshot", "arc_easy")]
    perplexity, apart, piqa, _ = record["metrics"]
    assert sum(perplexity["window_nll"]) / 3 == pytest.approx(perplexity["nll"])
    # The unquantized model's weights are stored in 16 bits: that is its floor in a float32 run of a float32 source.
    assert 0 < reference["metrics"][1]["value"] < 1e-4 < apart["value"]
    assert len(piqa["scores"]["acc"]["correct"]) == 8
    assert record["reference"]["gaps"] == [
        gap(mine, theirs) for mine, theirs in zip(record["metrics"], reference["metrics"], strict=True)
    ]
    assert record["reference"]["nll_gap"] == record["reference"]["gaps"][:1]
    sources = [entry.get("task", entry.get("corpus")) for entry in record["data"]["evaluations"]]
    assert sources[2:] == ["piqa", "arc_easy"]
    assert len(record["data"]["evaluations"][2]["sha256"]) == 64
    assert set(record["phases"]) == {"load", "reference", "quantize", "evaluate"}


def test_the_noise_floor_of_a_bfloat16_run_is_the_unquantized_model_s_own(spec, corpus_file):
    only = (DivergenceSpec(corpus=str(corpus_file), context=32, windows=3),)
    reference = with_key(run(spec(evaluations=only, dtype="bfloat16")))
    record = run(spec("rtn", only, "bfloat16", bits=4, group_size=32), reference=reference)
    floor, value = reference["metrics"][0]["value"], record["metrics"][0]["value"]
    assert record["metrics"][0]["reference_dtype"] == "float32"
    assert 0 < floor < value
    assert record["reference"]["gaps"] == [value - floor]


def test_the_reference_is_made_once(spec, monkeypatch):
    made = []
    real = evaluations.build_reference
    monkeypatch.setattr(evaluations, "build_reference", lambda *given: made.append(1) or real(*given))
    reference = with_key(run(spec()))
    run(spec("rtn", bits=4, group_size=32), reference=reference)
    assert made == [1]


def test_the_references_of_a_run_must_fit_in_the_cache_together(spec, corpus_file, monkeypatch):
    both = tuple(DivergenceSpec(corpus=str(corpus_file), context=32, windows=windows) for windows in (3, 4))
    assert [entry["windows"] for entry in run(spec(evaluations=both))["metrics"]] == [3, 4]
    references = list(cache_folder("reference").iterdir())
    assert len(references) == 2
    monkeypatch.setenv("SAGEBENCH_CACHE_GB", str(1.5 * max(map(folder_bytes, references)) / 1e9))
    for folder in references:
        shutil.rmtree(folder)
    with pytest.raises(InputError, match="and the run's others"):
        run(spec(evaluations=both))


def test_what_changed_since_it_was_planned_is_not_measured_under_the_old_key(spec):
    planned = spec()
    changed = planned.model.model_copy(update={"content": "0" * 16})
    with pytest.raises(
        InputError, match=r"model .* has sha256 .*, planned with 0000000000000000\.\.\.; run the command again"
    ):
        run(planned.model_copy(update={"model": changed}))
    task = ZeroShotSpec(task="piqa", source="local", limit=8, content="0" * 16)
    with pytest.raises(InputError, match=r"task 'piqa': its file has sha256 .*; run the command again"):
        run(spec(evaluations=(task,)))


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_quantized_model_that_equals_the_unquantized_one_is_refused(kept, spec, monkeypatch):
    # Weights that are put back after quantization: what a method does that forgets to install its result.
    monkeypatch.setattr(runner, "quantize_model", quantize_and_forget(runner.quantize_model))
    one = spec().evaluations[kept : kept + 1]
    reference = with_key(run(spec(evaluations=one)))
    with pytest.raises(NoOpError, match=f"{one[0].metric} on .* equals the unquantized model's exactly"):
        run(spec("rtn", one, bits=3, group_size=32), reference=reference)


def test_a_divergence_of_zero_is_refused_without_any_record_of_the_unquantized_model(spec, monkeypatch):
    monkeypatch.setattr(runner, "quantize_model", quantize_and_forget(runner.quantize_model))
    with pytest.raises(NoOpError, match=r"divergence on .* equals the unquantized model's exactly"):
        run(spec("rtn", spec().evaluations[1:2], bits=3, group_size=32))


def quantize_and_forget(real):
    def quantize(model, *arguments):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found = real(model, *arguments)
        model.load_state_dict(before)
        return found

    return quantize


def test_a_result_is_scored_once_unless_fresh(spec, monkeypatch):
    from harness.metrics import zeroshot as module

    scored = []
    real = module.zeroshot
    monkeypatch.setattr(module, "zeroshot", lambda *given, **more: scored.append(1) or real(*given, **more))
    only = spec().evaluations[2:3]
    first = run(spec(evaluations=only))
    assert run(spec(evaluations=only))["metrics"] == first["metrics"]
    assert len(scored) == 1
    run(spec(evaluations=only), fresh=True)
    run(spec("rtn", only, bits=3, group_size=32))
    run(spec("rtn", only, bits=4, group_size=32))
    assert len(scored) == 4


def test_changed_documents_are_scored_again(spec, data):
    only = spec().evaluations[2:3]
    first = run(spec(evaluations=only))["metrics"][0]
    path = data / "zeroshot" / "piqa.jsonl"
    path.write_text(path.read_text().replace("w1", "w9"))
    assert run(spec(evaluations=only))["metrics"][0]["loglikelihood"] != first["loglikelihood"]


def test_another_tokenizer_is_scored_again_and_has_a_reference_of_its_own(spec, tiny_folder):
    first = run(spec())
    path = tiny_folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"w1"', '"w~"').replace('"w2"', '"w1"').replace('"w~"', '"w2"'))
    again = run(spec())
    for before, now in zip(first["metrics"], again["metrics"], strict=True):
        assert before != now
    # The source is float32 and its floor small; against the reference of other tokens it would be in the hundreds.
    assert again["metrics"][1]["value"] < 1e-4
    tokens = [[entry.get("tokens_sha256") for entry in record["data"]["evaluations"]] for record in (first, again)]
    assert tokens[0][0] == tokens[0][1] != tokens[1][0]
    assert tokens[0][2:] == [None, None]


def test_missing_documents_are_found_before_anything_is_quantized(spec, data, monkeypatch):
    (data / "zeroshot" / "piqa.jsonl").unlink()
    monkeypatch.setattr(runner, "quantize_model", None)
    with pytest.raises(InputError, match="task 'piqa': no file"):
        run(spec("rtn", bits=3, group_size=32))


@pytest.mark.parametrize(
    ("metric", "number"), [("perplexity", "nll"), ("divergence", "window_kl"), ("zeroshot", "loglikelihood")]
)
def test_entries_are_the_same_only_if_their_exact_number_is(metric, number):
    entry = {"metric": metric, number: 1.5}
    assert same_as_reference(entry, dict(entry))
    assert not same_as_reference(entry, {**entry, number: 1.5000001})
    assert not same_as_reference({"metric": metric}, {"metric": metric})


def test_no_divergence_at_all_is_no_quantization():
    nothing = {"metric": "divergence", "value": 0.0, "window_kl": [0.0, 0.0]}
    assert same_as_reference(nothing, {**nothing, "value": 1e-6, "window_kl": [1e-6, 1e-6]})
