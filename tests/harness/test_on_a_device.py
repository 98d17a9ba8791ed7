"""All that a run does, on a CUDA device that is only pretended: no fault, and the numbers of the CPU."""

import documents
import pytest
import tiny
import torch

from harness import estimate
from harness import quantize as harness_quantize
from harness.checkpoint.read import load_checkpoint
from harness.checkpoint.write import write_checkpoint
from harness.cli import main, reproduce
from harness.generation import sample_windows
from harness.metrics.divergence import divergence
from harness.metrics.perplexity import cut_windows, perplexity
from harness.models import load
from harness.models.blocks import quantize_only
from harness.models.load import load_model
from harness.models.reparameterize import reparameterize
from harness.models.source import resolve_model
from harness.models.stored import load_stored
from harness.quantize import quantize_model
from harness.reference import build_reference
from harness.runner import run
from harness.spec import (
    STORED,
    CalibrationSpec,
    DivergenceSpec,
    MethodSpec,
    ModelSpec,
    PerplexitySpec,
    RunSpec,
    ZeroShotSpec,
)
from harness.zeroshot.model import InMemoryModel
from kernels.linear import PackedLinear
from methods import create_method
from methods.registry import builtin_method_names

# What of methods that work on whole blocks a layer alone does not show: see tests/contract.
WAYS = [
    *((name, {}) for name in builtin_method_names()),
    ("sage-x", {"tuning": "scales", "without": ["allocation", "weighting"]}),
    ("sage-x", {"tuning": "model"}),
    ("sage-x", {"mode": "weights-only"}),
]
SHORT = {**tiny.OPTIONS, "slim-llm": {"bits": 3, "group_size": -1}, "mg-ptq": {"group_size": 64, "steps": 3}}


@pytest.fixture
def spec(tiny_folder, corpus_file, tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEBENCH_DATA", str(documents.write(tmp_path / "data", "piqa", count=4)))
    text = {"corpus": str(corpus_file), "context": 32}

    def make(device, method="gptq", dtype="float32", **options):
        return RunSpec(
            model=ModelSpec(name=str(tiny_folder), dtype=dtype, device=device),
            method=MethodSpec(name=method, options=options),
            calibration=None if method == "fp16" else CalibrationSpec(**text, samples=4),
            evaluations=(
                PerplexitySpec(**text, windows=2),
                DivergenceSpec(**text, windows=2),
                ZeroShotSpec(task="piqa", source="local"),
            ),
        )

    return make


@pytest.fixture
def twice(pretended_cuda):
    """Results of a function of the device: on the CPU, and on the pretended one."""

    def both(function):
        here = function("cpu")
        with pretended_cuda:
            return here, function("cuda")

    return both


def measured(record):
    """What of a record must not depend on the device."""
    layers = [{key: value for key, value in layer.items() if key != "seconds"} for layer in record["layers"]]
    return record["metrics"], layers, record["ledger"]["payload_bytes"], record.get("weights")


def quantized(name, model, options, device, placement=None):
    """What becomes of `model`, as tensors by name: packed weights, folded parameters, and logits."""
    found = quantize_model(model, create_method(name, **options), tiny.tokens(), placement=placement)
    packed = {f"{layer} {key}": t for layer, weight in found.packed.items() for key, t in weight.tensors().items()}
    assert not any(tensor.is_cuda for tensor in packed.values())
    return {**packed, **found.folded, "logits": model(tiny.tokens(1).to(device)).logits.cpu()}


def same(here, there):
    return here.keys() == there.keys() and all(torch.equal(tensor, there[name]) for name, tensor in here.items())


@pytest.mark.parametrize(("name", "options"), WAYS, ids=str)
def test_a_method_makes_the_same_of_a_model(name, options, twice):
    def make(device):
        model = tiny.build().to(device)
        quantize_only(model, 1)
        found = quantized(name, model, {**SHORT.get(name, {}), **options}, device)
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        return found

    assert same(*twice(make))


def test_a_run_has_the_same_figures(spec, twice):
    here, there = twice(lambda device: run(spec(device, dtype="bfloat16", bits=3, group_size=32)))
    assert measured(there) == measured(here)
    assert there["environment"]["gpus"] == ["Pretended GPU"]
    assert there["phases"]["evaluate"]["peak_bytes"] == there["phases"]["evaluate"]["peak_allocated_bytes"]


def test_kept_weights_and_an_interrupted_run_have_the_same_figures(spec, pretended_cuda, monkeypatch):
    short = spec("cuda", bits=3, group_size=32)
    short = short.model_copy(update={"evaluations": short.evaluations[:1]})
    real = harness_quantize._quantize_layers

    def interrupted(blocks, index, *given):
        if index == 1:
            raise KeyboardInterrupt
        return real(blocks, index, *given)

    with pretended_cuda:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(harness_quantize, "_quantize_layers", interrupted)
            run(short)
        resumed, kept, fresh = run(short), run(short), run(short, fresh=True)
    assert (resumed["quantization"]["restored_blocks"], kept["quantization"]["from_cache"]) == (1, True)
    assert measured(resumed) == measured(kept) == measured(fresh)


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("gptq", "streamed from disk"),
        ("micromix", "one block at a time"),
        ("aptq", "one block at a time"),
        ("awq", "streamed from disk"),
    ],
)
def test_a_model_that_is_larger_than_the_device_or_memory(name, placement, tiny_folder, twice, monkeypatch):
    options = SHORT.get(name, {})

    def make(device):
        if device == "cuda" and placement == "one block at a time":
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1000))
            monkeypatch.setattr(torch.cuda, "memory_reserved", torch.cuda.memory_allocated)
        elif device == "cuda":
            monkeypatch.setattr(load, "available_memory", lambda device: 1000)
        loaded = load_model(str(tiny_folder), device=device, quantized_blocks=1)
        assert loaded.placement.name == (placement if device == "cuda" else "whole")
        return quantized(name, loaded.model, options, device, loaded.placement)

    assert same(*twice(make))


def test_an_unquantized_run_of_a_model_larger_than_memory_has_the_same_figures(spec, twice, monkeypatch):
    def make(device):
        if device == "cuda":
            monkeypatch.setattr(load, "available_memory", lambda device: 1000)
        return run(spec(device, "fp16"))

    here, there = twice(make)
    assert there["model"]["placement"] == "streamed from disk"
    assert measured(there) == measured(here)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_measured_alike(family, twice):
    ids = tiny.tokens(1, 64).flatten()
    asked = [(("", ""), ids[:length].tolist(), ids[20:end].tolist()) for length in (5, 6) for end in (21, 23, 24)]
    asked.append((("", ""), tiny.tokens(1, 140)[0].tolist(), [5, 6]))  # longer than the model's context

    def make(device):
        model = tiny.build(family).to(device)
        reference = build_reference(device, model, cut_windows(ids, 32))
        likelihoods = InMemoryModel(model, tiny.tokenizer(), lambda done, total: None)._loglikelihood_tokens(asked)
        return (
            perplexity(model, ids, context=32),
            likelihoods,
            divergence(model.bfloat16(), ids, reference, context=32),
            reference.logits(0, device).tolist(),
        )

    here, there = twice(make)
    assert there == here


def test_calibration_text_is_the_same(twice):
    here, there = twice(lambda device: sample_windows(tiny.build().to(device), 2, 16, seed=0))
    assert torch.equal(here, there)


def test_weights_move_off_their_grid_as_on_the_cpu(twice):
    def make(device):
        model = tiny.build().to(device)
        reparameterize(model, seed=0)
        return dict(model.named_parameters())

    assert same(*twice(make))


@pytest.fixture
def arguments(tiny_folder, corpus_file, monkeypatch):
    monkeypatch.setattr(estimate, "_operations_per_second", lambda device, dtype: 1e12)  # a large product, for a GPU
    return ["--calibration-corpus", str(corpus_file), "--calibration-samples", "4", "--context", "32"]


def test_a_checkpoint_is_written_and_decodes_there(arguments, tiny_folder, tmp_path, pretended_cuda):
    folder, ids = tmp_path / "checkpoint", tiny.tokens(1)
    quantize = ["quantize", "--model", str(tiny_folder), "--method", "gptq", "--option", "group_size=32"]
    with pretended_cuda:
        assert main([*quantize, *arguments, "--dtype", "float32", "--device", "cuda", "--out", str(folder)]) == 0
        found = load_checkpoint(folder, dequantize=True).to("cuda")(ids.to("cuda")).logits.cpu()
    assert torch.equal(found, load_checkpoint(folder, dequantize=True)(ids).logits)


@pytest.mark.parametrize("kind", ["checkpoint", "gguf"])
def test_a_stored_model_is_read_to_the_device(kind, gguf_file, tmp_path, twice, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a mode sees its own thread alone
    source, ids = resolve_model(str(gguf_file)), tiny.tokens(1, 64).flatten()
    if kind == "checkpoint":
        loaded, method = load_model(str(tiny.save(tmp_path / "model"))), create_method("rtn", **tiny.OPTIONS["rtn"])
        packed = quantize_model(loaded.model, method, None)
        facts = {"method": {"name": "rtn", "options": {}}, "ledger": {"total_bytes": 0}}
        write_checkpoint(tmp_path / "checkpoint", loaded, packed, facts)
        source = resolve_model(str(tmp_path / "checkpoint"))

    def make(device):
        model = load_stored(source, "float32", device).model
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        return perplexity(model, ids, context=32)

    here, there = twice(make)
    assert there == here


def test_a_table_is_made(arguments, tiny_folder, corpus_file, tmp_path, pretended_cuda):
    experiment, out = tiny.write_experiment(tmp_path / "small.yaml"), tmp_path / "results"
    table = ["--experiment", str(experiment), "--model", str(tiny_folder), "--corpus", str(corpus_file)]
    with pretended_cuda:
        assert reproduce([*table, *arguments, "--device", "cuda", "--out", str(out)]) == 0
    assert len(list((out / "runs").glob("*.json"))) == 3


def test_packed_layers_answer_and_are_scored_there(arguments, spec, tiny_folder, tmp_path, pretended_cuda, monkeypatch):
    """Sixteen tokens and fewer by Triton kernels, in the interpreter; more by a dense product with decoded weights."""
    launch = pytest.importorskip("kernels.triton.launch")
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a mode sees its own thread alone
    folder, ids = tmp_path / "checkpoint", tiny.tokens(1)
    quantize = ["quantize", "--model", str(tiny_folder), "--method", "sage-ptq", "--option", "group_count=10"]
    assert main([*quantize, *arguments, "--dtype", "float32", "--device", "cpu", "--out", str(folder)]) == 0

    def scored(device):
        stored = {"method": MethodSpec(name=STORED), "calibration": None}
        model = ModelSpec(name=str(folder), device=device)
        found = run(
            spec(device).model_copy(update={**stored, "model": model, "evaluations": spec(device).evaluations[::2]})
        )
        return [(metric["value"], metric.get("loglikelihood")) for metric in found["metrics"]]

    dense = load_checkpoint(folder, dequantize=True)
    expected = {length: dense(ids[:, :length]).logits for length in (5, 20)}
    accuracy = scored("cpu")
    made, gpu_matrix = [], launch.gpu_matrix
    monkeypatch.setattr(launch, "gpu_matrix", lambda *given: made.append(gpu_matrix(*given)) or made[-1])
    with pretended_cuda, torch.no_grad():
        packed = load_checkpoint(folder).to("cuda")
        for length, logits in expected.items():
            found = packed(ids[:, :length].to("cuda")).logits.cpu()
            assert torch.allclose(found, logits, rtol=1e-4, atol=1e-4)
        assert len(made) == sum(isinstance(module, PackedLinear) for module in packed.modules())
        assert scored("cuda") == accuracy
