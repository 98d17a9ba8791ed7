import json

import pytest
from pydantic import ValidationError

from harness.spec import CalibrationSpec, MethodSpec, ModelSpec, PerplexitySpec, RunSpec

CONTENT = {
    "model": {"name": "m", "dtype": "float32", "device": "cpu", "reparameterize": False, "seed": 0},
    "method": {"name": "gptq", "options": {"bits": 3, "group_size": 64}},
    "calibration": {"corpus": "c4", "split": "train", "samples": 16, "context": 2048, "seed": 0},
    "evaluations": [{"metric": "perplexity", "corpus": "wikitext2", "split": "test", "context": 2048, "windows": 12}],
}
CHANGES = {
    ("model", "name"): "n", ("model", "dtype"): "float16", ("model", "device"): "cuda",
    ("model", "reparameterize"): True, ("model", "seed"): 1,
    ("method", "name"): "rtn", ("method", "options"): {"bits": 4, "group_size": 64},
    ("calibration", "corpus"): "ptb", ("calibration", "split"): "valid", ("calibration", "samples"): 17,
    ("calibration", "context"): 1024, ("calibration", "seed"): 1,
    ("evaluations", 0, "corpus"): "c4", ("evaluations", 0, "split"): "valid", ("evaluations", 0, "context"): 1024,
    ("evaluations", 0, "windows"): None, ("evaluations", 0, "content"): "ab", ("calibration", "content"): "ab",
    ("model", "content"): "ab",
}  # fmt: skip


def spec_of(path=(), value=None):
    """The spec of CONTENT with one value changed."""
    content = json.loads(json.dumps(CONTENT))
    if path:
        place = content
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
    return RunSpec.model_validate_json(json.dumps(content))


def test_equal_specs_have_equal_keys_however_they_were_written():
    spec = spec_of()
    shuffled = RunSpec(
        evaluations=(PerplexitySpec(windows=12, corpus="wikitext2"),),
        calibration=CalibrationSpec(samples=16, corpus="c4"),
        method=MethodSpec(options={"group_size": 64, "bits": 3}, name="gptq"),
        model=ModelSpec(name="m"),
    )
    assert shuffled == spec
    assert shuffled.key == spec.key
    assert len(spec.key) == 16
    assert set(spec.key) <= set("0123456789abcdef")


def test_the_key_is_the_same_in_every_process_and_on_every_day():
    # A change here makes every finished record of every user count as absent: raise SPEC_VERSION knowingly.
    assert spec_of().key == "5079e77b30c61d48"


@pytest.mark.parametrize("path", CHANGES, ids=lambda path: ".".join(map(str, path)))
def test_any_change_changes_the_key(path):
    changed = spec_of(path, CHANGES[path])
    assert changed.key != spec_of().key
    # What is evaluated does not matter to the quantized weights; all else does.
    same_weights = path[0] == "evaluations"
    assert (changed.quantization_key("sha") == spec_of().quantization_key("sha")) == same_weights


def test_the_quantization_key_follows_its_facts():
    spec = spec_of()
    assert len({spec.quantization_key(*facts) for facts in [("a", "b"), ("a", "c"), ("ab",), ()]}) == 4


def test_no_calibration_is_another_run_than_some():
    assert spec_of(("calibration",), None).key != spec_of().key


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("mode",), 1),
        (("model", "dtyp"), "float32"),
        (("method", "option"), {}),
        (("calibration", "sample"), 3),
        (("evaluations", 0, "window"), 3),
        (("model", "dtype"), "float64"),
        (("model", "seed"), -1),
        (("calibration", "samples"), 0),
        (("calibration", "samples"), "16"),
        (("evaluations", 0, "windows"), 0),
        (("evaluations", 0, "context"), 1),
        (("evaluations", 0, "metric"), "speed"),
    ],
)
def test_unknown_keys_and_bad_values_are_refused(path, value):
    with pytest.raises(ValidationError):
        spec_of(path, value)


def test_a_spec_cannot_be_changed_after_its_key_was_taken():
    with pytest.raises(ValidationError):
        spec_of().model.name = "other"


OTHERS = [
    {"metric": "zeroshot", "task": "piqa", "source": "local", "limit": 200, "content": None},
    {
        "metric": "divergence", "corpus": "wikitext2", "split": "test", "context": 2048, "windows": 4,
        "reference_dtype": "float32", "content": None,
    },
]  # fmt: skip


@pytest.mark.parametrize("entry", OTHERS, ids=lambda entry: entry["metric"])
def test_the_metric_decides_what_an_evaluation_is(entry):
    spec = spec_of(("evaluations", 0), entry)
    assert spec.model_dump(mode="json")["evaluations"] == [entry]
    assert spec.key != spec_of().key
    keys = {spec_of(("evaluations", 0), {**entry, name: value}).key for name, value in CHANGED[entry["metric"]].items()}
    assert len(keys | {spec.key}) == len(CHANGED[entry["metric"]]) + 1


CHANGED = {
    "zeroshot": {"task": "boolq", "source": "hub", "limit": None, "content": "ab"},
    "divergence": {
        "corpus": "c4",
        "split": "valid",
        "context": 64,
        "windows": None,
        "content": "ab",
        "reference_dtype": "bfloat16",
    },
}


@pytest.mark.parametrize(
    "entry",
    [
        {**OTHERS[0], "limit": 0},
        {**OTHERS[0], "source": "elsewhere"},
        {**OTHERS[0], "corpus": "c4"},
        {**OTHERS[1], "task": "piqa"},
        {**OTHERS[1], "reference_dtype": "float64"},
        {"corpus": "wikitext2", "task": "piqa"},
    ],
)
def test_an_evaluation_takes_only_what_its_metric_knows(entry):
    with pytest.raises(ValidationError):
        spec_of(("evaluations", 0), entry)


def test_the_description_is_one_line():
    assert spec_of().describe() == "gptq(bits=3, group_size=64) on m"
