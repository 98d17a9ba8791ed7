"""Packed products against dense ones, matrix times vector: `tox -e bench` saves all figures as JSON.

Sizes are those of LLaMA-2-7B. On a CPU both sides take bfloat16 inputs, on a GPU float16; on a GPU every call finds a
cold second-level cache. The first test is the bar; it takes its two sides in turns, so that both see the same machine,
and refuses a machine whose cores are busy: there a round is the scheduler's slice, whatever it multiplies.
"""

import statistics
import time

import pytest
import torch

from kernels import random_weights as random
from kernels.layouts.trellis_tables import RATES
from kernels.products import resident_matrix

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float16 if DEVICE.type == "cuda" else torch.bfloat16
SIZE = (4096, 4096)
LAYOUTS = {
    "codebook n_lut 4": lambda shape: random.random_codebook(shape, 0, device=DEVICE),
    "codebook n_lut 3": lambda shape: random.random_codebook(shape, 0, index_bits=3, device=DEVICE),
    "uniform 4 bit g128": lambda shape: random.random_uniform(shape, 0, device=DEVICE),
    "uniform 3 bit g128": lambda shape: random.random_uniform(shape, 0, bits=3, device=DEVICE),
    "uniform 2 bit g128": lambda shape: random.random_uniform(shape, 0, bits=2, device=DEVICE),
    "binary g128": lambda shape: random.random_binary(shape, 0, device=DEVICE),
    "partial binary 10 % g128": lambda shape: random.random_partial_binary(shape, 0, device=DEVICE),
    "residual binary 128": lambda shape: random.random_residual_binary(shape, 0, device=DEVICE),
    "trellis 2 bit": lambda shape: random.random_trellis(shape, 0, classes=(RATES.index(2),), device=DEVICE),
}


def product(layout, shape=SIZE):
    """The function that multiplies by a matrix of `layout`, and the bytes that it reads; "dense" is torch's."""
    if layout == "dense":
        weight = torch.randn(shape, device=DEVICE).to(DTYPE)
        return lambda x: torch.nn.functional.linear(x, weight), 2 * weight.numel()
    matrix = resident_matrix([LAYOUTS[layout](shape)], DEVICE)
    if matrix is None:
        pytest.skip("no kernel here")
    if hasattr(matrix, "tune"):
        matrix.tune(1, DTYPE)
    return matrix.multiply, matrix.nbytes


def test_sage_ptq_is_at_least_half_again_as_fast_as_dense():
    x = torch.randn(1, SIZE[1], device=DEVICE).to(DTYPE)
    packed, dense = product("codebook n_lut 4")[0], product("dense")[0]
    times = {packed: [], dense: []}
    for _ in range(61):
        for multiply, taken in times.items():
            start = time.perf_counter()
            multiply(x)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    fastest, median = ([1e3 * of(taken[1:]) for taken in times.values()] for of in (min, statistics.median))
    ratio = median[1] / median[0]
    print(f"\nSAGE-PTQ 4096 x 4096: {median[0]:.3f} ms, dense {DTYPE} {median[1]:.3f} ms, ratio {ratio:.2f}")
    if any(half > 2 * best for half, best in zip(median, fastest, strict=True)):
        best = " and ".join(f"{value:.3f}" for value in fastest)
        pytest.skip(f"other work on this machine's cores: the fastest rounds took {best} ms, ratio {ratio:.2f}")
    assert ratio >= 1.5


@pytest.mark.parametrize("vectors", [1, 8])
@pytest.mark.parametrize("layout", ["dense", *LAYOUTS])
def test_matrix_vector(benchmark, layout, vectors):
    multiply, size = product(layout)
    x = torch.randn(vectors, SIZE[1], device=DEVICE).to(DTYPE)
    flush = torch.empty(1 << 28, dtype=torch.int8, device=DEVICE) if DEVICE.type == "cuda" else None

    def once():
        multiply(x)
        if flush is not None:
            torch.cuda.synchronize()

    def cold():
        if flush is not None:
            flush.zero_()
            torch.cuda.synchronize()

    benchmark.group = f"{vectors} x 4096 x 4096 on {DEVICE.type}"
    benchmark.extra_info.update(layout=layout, vectors=vectors, bytes=size, dtype=str(DTYPE))
    benchmark.pedantic(once, setup=cold, rounds=40, warmup_rounds=3)
