"""Our uniform kernels beside GemLite's and GPTQModel's, matrix times vector: `tox -e bench-peers` saves them as JSON.

All multiply by the same codes and scales, in turns; a product outside its tolerance is not timed. No bar: which kernel
a peer has depends on the machine, and its name is saved.
"""

import statistics
from importlib import metadata

import peer_kernels
import pytest
import torch
from turns import Turns

from kernels.layouts import UniformWeight
from kernels.products import resident_matrix
from kernels.random_weights import random_uniform

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.float16 if CUDA else torch.bfloat16
SIZE = (4096, 4096)
# Norm of the error beside that of the product. Ours as everywhere; peers hold scales, and scales times zero points, in
# the dtype of the inputs.
TOLERANCE = {"ours": {torch.float16: 1e-3, torch.bfloat16: 1e-2}, "peer": {torch.float16: 5e-3, torch.bfloat16: 2e-2}}
WIDTHS = {"gemlite": (2, 4, 8), "gptqmodel": (2, 3, 4, 8)}
CASES = [
    *((peer, bits, False) for peer, widths in WIDTHS.items() for bits in widths),
    *((peer, 4, True) for peer in WIDTHS),  # some kernels have no zero points
]


def peer_product(peer, weight):
    if peer == "gemlite" and not CUDA:
        pytest.skip("GemLite's kernels need a CUDA device")
    pytest.importorskip(peer, exc_type=ImportError)
    return getattr(peer_kernels, f"{peer}_product")(weight, DEVICE, DTYPE)


@pytest.mark.parametrize("vectors", [1, 8])
@pytest.mark.parametrize(("peer", "bits", "symmetric"), CASES)
@torch.inference_mode()
def test_matrix_vector_beside_a_peer(benchmark, peer, bits, symmetric, vectors):
    weight = random_uniform(SIZE, 0, bits=bits, group_size=128, symmetric=symmetric)
    theirs, kernel = peer_product(peer, weight)
    there = {name: tensor.to(DEVICE) for name, tensor in weight.tensors().items()}
    matrix = resident_matrix([UniformWeight.from_tensors(there, weight.metadata())], DEVICE)
    if matrix is None:
        pytest.skip("no kernel of ours here")
    if hasattr(matrix, "tune"):
        matrix.tune(vectors, DTYPE)
    dense = weight.decode(DTYPE).to(DEVICE)
    x = torch.randn(vectors, SIZE[1], device=DEVICE).to(DTYPE)
    products = {
        "ours": lambda: matrix.multiply(x),
        "peer": lambda: theirs(x),
        "dense": lambda: torch.nn.functional.linear(x, dense),
    }
    exact = x.cpu().double() @ weight.decode().double().T
    for side, tolerance in TOLERANCE.items():
        error = (products[side]().cpu().double() - exact).norm() / exact.norm()
        assert error <= tolerance[DTYPE], f"{side}: {float(error):.1e}"

    flush = torch.empty(1 << 28 if CUDA else 0, dtype=torch.int8, device=DEVICE)

    def settle():
        if CUDA:
            torch.cuda.synchronize()

    def cold():
        flush.zero_()
        settle()

    turns = Turns(products, before=cold, after=settle)
    turns.once()
    for seconds in turns.seconds.values():
        seconds.clear()  # compiled, tuned and warm by now
    benchmark.group = f"{vectors} x 4096 x 4096 on {DEVICE.type}"
    benchmark.pedantic(turns.once, rounds=20)
    medians = {side: 1e3 * statistics.median(seconds) for side, seconds in turns.seconds.items()}
    benchmark.extra_info.update(
        peer=peer, version=metadata.version(peer), kernel=kernel, bits=bits, group_size=128, symmetric=symmetric,
        vectors=vectors, dtype=str(DTYPE), median_ms=medians,
        fastest_ms={side: 1e3 * seconds for side, seconds in turns.fastest().items()},
    )  # fmt: skip
    listed = ", ".join(f"{side} {taken:.3f} ms" for side, taken in medians.items())
    print(f"\n{bits} bit {'symmetric' if symmetric else ''} x {vectors}, {peer} {kernel}: {listed}")
