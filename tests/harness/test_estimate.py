import os

import pytest
import torch

from harness import estimate as module
from harness.estimate import estimate
from harness.spec import CalibrationSpec, DecodeSpec, MethodSpec, ModelSpec, PerplexitySpec, RunSpec, ZeroShotSpec


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """A machine that does 10^11 operations a second."""
    monkeypatch.setattr(module, "_operations_per_second", lambda device, dtype: 1e11)


def spec_of(method="fp16", *, model="opt-1.3b", windows=10, samples=8, dtype="float32", **options):
    calibrated = method in ("gptq", "slim-llm-plus", "sage-x")
    calibration = CalibrationSpec(corpus="c4", samples=samples) if calibrated else None
    return RunSpec(
        model=ModelSpec(name=model, dtype=dtype),
        method=MethodSpec(name=method, options=options),
        calibration=calibration,
        evaluations=(PerplexitySpec(corpus="wikitext2", windows=windows),),
    )


def test_the_forward_passes_of_an_evaluation_are_counted():
    per_window = 2 * 1_315_758_080 * 2048 / 1e11
    more = estimate(spec_of(windows=20)).seconds - estimate(spec_of(windows=10)).seconds
    assert 10 * per_window <= more <= 20 * per_window
    assert estimate(spec_of(windows=None)).seconds > estimate(spec_of(windows=100)).seconds


def test_a_task_costs_what_its_documents_and_answers_do():
    def seconds(task, limit):
        evaluations = (ZeroShotSpec(task=task, source="hub", limit=limit),)
        return estimate(spec_of().model_copy(update={"evaluations": evaluations})).seconds

    nothing = estimate(spec_of().model_copy(update={"evaluations": ()})).seconds
    assert seconds("arc_easy", 100) - nothing == pytest.approx(2 * (seconds("piqa", 100) - nothing))
    assert seconds("piqa", 9999) == seconds("piqa", None) > seconds("piqa", 200)


def test_quantization_and_calibration_cost_more():
    fp16, rtn, gptq = (estimate(spec_of(name)) for name in ("fp16", "rtn", "gptq"))
    assert fp16.seconds < rtn.seconds < gptq.seconds
    assert rtn.memory_bytes < gptq.memory_bytes
    assert estimate(spec_of("gptq", samples=128)).seconds > gptq.seconds


def test_every_epoch_of_a_method_that_trains_costs_a_pass_forward_and_two_back():
    one, five = (estimate(spec_of("slim-llm-plus", epochs=epochs)).seconds for epochs in (1, 5))
    pass_forward = 2 * 1_207_959_552 * 8 * 2048 / 1e11  # of the linear layers alone
    assert five - one == pytest.approx(4 * 3 * 1.4 * pass_forward, rel=0.01)
    assert one > estimate(spec_of("gptq")).seconds


@pytest.mark.parametrize(
    ("options", "epochs"),
    [({"tuning": "scales"}, 4), ({"tuning": "blocks"}, 20), ({"tuning": "model"}, 24), ({"mode": "weights-only"}, -2)],
)
def test_training_of_sage_x_counts(options, epochs):
    """On 8 samples, all of them four times, beside the gradients that every calibrated run takes, and its passes."""
    plain, trained = (estimate(spec_of("sage-x", **each)).seconds for each in ({}, options))
    pass_forward = 2 * 1_207_959_552 * 8 * 2048 / 1e11
    assert trained - plain == pytest.approx(3 * epochs * 1.4 * pass_forward, rel=0.01)


def test_weights_that_another_run_makes_cost_nothing_more():
    assert estimate(spec_of("gptq"), quantized=True).seconds == estimate(spec_of()).seconds


def test_decoding_costs_its_prompts_and_its_steps():
    def seconds(**options):
        return estimate(spec_of().model_copy(update={"evaluations": (DecodeSpec(**options),)})).seconds

    step = 4 * 1_315_758_080 / module._COPY_BYTES_PER_SECOND["cpu"]
    assert seconds(tokens=74) - seconds(tokens=64) == pytest.approx(8 * 10 * step)
    assert seconds(prompt=2048) > 2 * seconds(prompt=128)
    assert seconds(rounds=15) > 1.5 * seconds(rounds=7)


def test_memory_holds_at_least_the_weights():
    full, half = (estimate(spec_of(dtype=dtype)).memory_bytes for dtype in ("float32", "float16"))
    assert full - half == 2 * 1_315_758_080
    assert half > 2 * 1_315_758_080


def test_a_folder_is_estimated_from_its_headers(tiny_folder):
    assert 0 < estimate(spec_of(model=str(tiny_folder))).seconds < estimate(spec_of()).seconds / 100


def test_an_uncatalogued_hub_model_is_estimated_without_fetching_it():
    assert estimate(spec_of(model="someone/some-model")).memory_bytes > 0


@pytest.mark.parametrize(
    ("model", "whole"), [("opt-66b", False), ("smollm2-135m", True), ("model.gguf", True)], ids=["hub", "asset", "gguf"]
)
def test_a_model_that_does_not_fit_is_streamed_unless_it_is_gguf(monkeypatch, model, whole):
    monkeypatch.setattr(module, "_sizes", lambda name: (10**9, 9 * 10**8))
    monkeypatch.setattr(module, "available_memory", lambda device: 10**9)
    streamed = 4 * (10**8 + 9 * 10**8 // 20)
    assert estimate(spec_of(model=model)).memory_bytes == (4 * 10**9 if whole else streamed) + 1_500_000_000


def test_the_speed_of_this_machine_is_measured_once(monkeypatch):
    monkeypatch.undo()
    speed = module._operations_per_second("cpu", "float32")
    assert 1e8 < speed < 1e15
    assert module._operations_per_second("cpu", "float32") == speed


def test_a_gpu_is_set_up_for_deterministic_products_before_its_speed_is_measured(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "to be restored")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def first_product(*size, **options):
        raise RuntimeError(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))

    monkeypatch.setattr(torch, "ones", first_product)
    module._operations_per_second.cache_clear()  # another test may have asked for it
    with pytest.raises(RuntimeError, match=":4096:8"):
        module._operations_per_second("cuda", "float16")
