"""Decode throughput: the arms of a comparison in turns, and what their times come to."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import numpy as np

from harness.metrics.decode import ArmTimes
from harness.runtime.stepper import Round, Stepper

Steps = Callable[[int, int], None]


def interleaved(
    arms: Mapping[str, Stepper], rounds: int, copy_gb_s: float, progress: Steps = lambda done, total: None
) -> dict[str, ArmTimes]:
    """Time `rounds` rounds of each arm, A, B, A, B, ..., after one of each that does not count."""
    found: dict[str, list[Round]] = {name: [] for name in arms}
    total = (rounds + 1) * len(arms)
    done = 0
    for number in range(rounds + 1):
        for name, stepper in arms.items():
            taken = stepper.run()
            if number > 0:
                found[name].append(taken)
            done += 1
            progress(done, total)
    return {name: summarize(taken, arms[name], copy_gb_s) for name, taken in found.items()}


def summarize(rounds: list[Round], stepper: Stepper, copy_gb_s: float) -> ArmTimes:
    """Medians and quartiles over rounds, percentiles over steps."""
    batch, tokens = rounds[0].tokens.shape
    speeds = [batch * len(taken.steps) / sum(taken.steps) for taken in rounds]
    steps = np.array([seconds for taken in rounds for seconds in taken.steps])
    first, third = np.percentile(speeds, [25, 75])
    p50, p95, p99 = (1e3 * float(value) for value in np.percentile(steps, [50, 95, 99]))
    # The cache as it is half way through.
    read = stepper.decoder.bytes_per_step(stepper.decoder.cache.filled - tokens // 2)
    effective = read / (p50 / 1e3) / 1e9
    return ArmTimes(
        tokens_per_second=statistics.median(speeds),
        iqr=(float(first), float(third)),
        time_to_first_token_ms=1e3 * statistics.median(taken.prefill for taken in rounds),
        ms_p50=p50,
        ms_p95=p95,
        ms_p99=p99,
        bytes_per_token=read,
        effective_gb_s=effective,
        share_of_copy=effective / copy_gb_s,
        rounds=speeds,
    )
