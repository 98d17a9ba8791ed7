"""What can only be seen on a GPU: the graph, and a decode loop in which nothing waits and nothing is allocated."""

import pytest
import torch

from harness.catalog import ShapeEntry
from harness.runtime import architecture
from harness.runtime.banded import Bands
from harness.runtime.build import packed_products
from harness.runtime.decoder import Decoder
from harness.runtime.stepper import Stepper
from harness.runtime.synthetic import synthetic_layer, synthetic_weights
from methods import create_method

VOCABULARY = 64
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def synthetic(method="sage-ptq", layers=3):
    device, dtype = torch.device("cuda"), torch.float16
    entry = ShapeEntry(
        block="llama", layers=layers, hidden=256, intermediate=512, heads=4, kv_heads=2, vocabulary=VOCABULARY
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architecture, "shapes", lambda: {"small": entry})
        shape = architecture.catalogued("small")
    layer = synthetic_layer(shape, create_method(method), device)
    return synthetic_weights(shape, layer, device, dtype, packed_products(device, dtype))


def prompt():
    return torch.randint(0, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0)).cuda()


def variants(*kernels):
    """How often the kernels were compiled in this process; the first entry of a device's cache holds the results."""
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


@pytest.mark.parametrize("method", ["sage-ptq", "gptq", "billm", "pb-llm"])
def test_a_graph_generates_what_the_eager_loop_does(method):
    weights = synthetic(method)
    eager = Stepper(Decoder(weights, 1, 64), prompt(), steps=20).run()
    replayed = Stepper(Decoder(weights, 1, 64), prompt(), steps=20, graph=True)
    for _ in range(2):
        assert torch.equal(replayed.run().tokens, eager.tokens)


def test_the_eager_loop_waits_for_nothing_and_compiles_nothing():
    from kernels.triton import kernels

    stepper = Stepper(Decoder(synthetic(), 1, 64), prompt(), steps=20)
    stepper.run()
    stepper.decoder.prefill(prompt())
    compiled = variants(kernels.table_kernel, kernels.reduce_kernel)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            stepper._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert variants(kernels.table_kernel, kernels.reduce_kernel) == compiled > 0


def test_nothing_waits_nothing_is_allocated_and_nothing_compiled_in_the_loop():
    from kernels.triton import kernels

    stepper = Stepper(Decoder(synthetic(), 1, 64), prompt(), steps=40, graph=True)
    stepper.run()
    stepper.decoder.prefill(prompt())
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    compiled = variants(kernels.table_kernel, kernels.reduce_kernel)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            stepper._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert variants(kernels.table_kernel, kernels.reduce_kernel) == compiled > 0


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_bands_generate_what_resident_weights_do(layers):
    weights = synthetic(layers=5)
    resident = Stepper(Decoder(weights, 1, 64), prompt(), steps=20).run()
    bands = Bands(layers, torch.device("cuda"))
    for block in weights.blocks:
        bands.take(block)
    bands.start()
    banded = Stepper(Decoder(weights, 1, 64, bands), prompt(), steps=20)
    for _ in range(2):
        assert torch.equal(banded.run().tokens, resident.tokens)
