"""The perplexity loop against a bare loop of forward passes, in one interleaved run: `tox -e bench`."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from harness.metrics.perplexity import perplexity
from harness.models.load import load_model

CONTEXT, ROUNDS = 2048, 3


@pytest.mark.model
def test_the_perplexity_loop_costs_at_most_five_percent(benchmark: Any) -> None:
    model = load_model("smollm2-135m").model
    window = torch.randint(0, model.config.vocab_size, (CONTEXT,), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {"bare": [], "measured": []}

    @torch.inference_mode()
    def bare() -> None:
        model(window[None], use_cache=False)

    def measured() -> None:
        perplexity(model, window, context=CONTEXT)

    def both() -> None:
        for name, loop in (("bare", bare), ("measured", measured)):
            start = time.perf_counter()
            loop()
            times[name].append(time.perf_counter() - start)

    benchmark.pedantic(both, rounds=ROUNDS, warmup_rounds=1)
    fastest = {name: min(taken) for name, taken in times.items()}
    ratio = fastest["measured"] / fastest["bare"]
    print(f"\none window: bare {fastest['bare']:.2f} s, perplexity {fastest['measured']:.2f} s, ratio {ratio:.3f}")
    assert ratio < 1.05
