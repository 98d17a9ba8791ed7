"""Every layout under mutated tensors and format parameters: refused, or decoded and multiplied without harm.

Checksums keep damage out of checkpoints; these are the files of somebody who renews the checksums.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import random_weights as random
from kernels.errors import InputError
from kernels.layouts import ChannelCodebookWeight, MicroscalingWeight, MixedWeight, TrellisWeight
from kernels.layouts.base import _LAYOUTS
from kernels.products import has_kernel, kernel_product

SHAPE = (20, 40)


def _mixed():
    draw = torch.Generator().manual_seed(0)
    constants = [torch.rand(20, 3, generator=draw).half() for _ in range(2)]
    bits = torch.randint(0, 2, (2, *SHAPE), generator=draw)
    return MixedWeight.pack(bits[0], constants[0], bits[1][:, :3], constants[1], widths=(1, 3, 2), group_size=16)


def _channel_codebook():
    draw = torch.Generator().manual_seed(0)
    codes, kept = torch.randint(0, 2, SHAPE, generator=draw), torch.rand(SHAPE, generator=draw)
    widths = torch.arange(40) % 4 + 1
    levels = torch.randn(int((1 << widths).sum()), generator=draw).half()
    return ChannelCodebookWeight.pack(codes, levels, widths=widths, outliers=kept < 0.1, weight=kept.half())


def _trellis():
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2, SHAPE, generator=draw).to(torch.uint8)
    scales = torch.randint(0, 100, (40,), generator=draw).to(torch.uint8)
    return TrellisWeight.pack(codes, torch.arange(40) % 16, scales, torch.randn(20, generator=draw).half())


def _microscaling():
    draw = torch.Generator().manual_seed(0)
    return MicroscalingWeight.pack(torch.randn(SHAPE, generator=draw), torch.randperm(40, generator=draw), (16, 16, 8))


WEIGHTS = {
    weight.layout: weight
    for weight in (
        random.random_dense(SHAPE, 0),
        random.random_uniform(SHAPE, 0, bits=[3, 2, 3], group_size=16, permuted=True),
        random.random_codebook(SHAPE, 0, salient=0.1),
        random.random_binary(SHAPE, 0, group_size=16),
        random.random_partial_binary(SHAPE, 0, group_size=16),
        random.random_residual_binary(SHAPE, 0, block_size=16, salient=0.3),
        _mixed(),
        _channel_codebook(),
        _trellis(),
        _microscaling(),
    )
}
NUMBERS = st.sampled_from([-1, 0, 1, 2, 7, 8, 9, 16, 17, 20, 40, 255, 2**31, 2**62]) | st.integers(-4, 70)
VALUES = NUMBERS | st.none() | st.booleans() | st.floats() | st.text(max_size=2) | st.lists(NUMBERS, max_size=4)


def test_every_layout_of_this_project_is_here():
    assert {name for name, kind in _LAYOUTS.items() if kind.__module__.startswith("kernels.")} == WEIGHTS.keys()


def changed(tensor, draw):
    """A tensor with other bytes, or of another shape or dtype."""
    if draw(st.integers(0, 9)):
        content = tensor.clone()
        flat = content.view(-1).view(torch.uint8)
        for _ in range(draw(st.integers(1, 3))):
            flat[draw(st.integers(0, flat.numel() - 1))] = draw(st.sampled_from([0, 1, 127, 128, 255]))
        return content
    return draw(st.sampled_from([tensor.view(-1)[:-1], tensor.view(-1, 1), tensor.to(torch.int64), tensor[:0]]))


@pytest.mark.parametrize("layout", WEIGHTS)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_mutated_weight_is_refused_or_decodes_and_multiplies(layout, data):
    weight = WEIGHTS[layout]
    tensors, metadata = weight.tensors(), weight.metadata()
    name = data.draw(st.sampled_from([*tensors, *metadata]))
    if name in tensors:
        tensors[name] = changed(tensors[name], data.draw)
    else:
        metadata[name] = data.draw(VALUES)
    inputs = torch.ones(2, 40)
    try:
        found = type(weight).from_tensors(tensors, metadata)
        found.check_content()
    except InputError:
        return
    assert found.nbytes() == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if found.shape != SHAPE:  # another matrix of as many bytes: the model refuses it
        inputs = torch.ones(2, found.shape[1])
    exact = inputs @ found.decode().T
    assert exact.shape == (2, found.shape[0])
    if has_kernel(inputs, found):
        product = kernel_product(inputs, found, None)
        # Constants that are not finite, or overflow, differ in how they do so.
        if bool(exact.isfinite().all()) and float(found.decode().abs().max()) < 1e3:
            torch.testing.assert_close(product, exact, rtol=1e-3, atol=1e-3)
