"""MicroMix: which channels get which format, and that weights and activations are both rounded."""

import pytest
import torch

from methods import LayerContext, LayerStatistics, create_method
from methods.micromix import channel_segments


def layer(rows=32, columns=512, seed=0):
    """Inputs with a few large channels among small ones."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.where(torch.rand(columns, generator=generator) < 0.02, 30.0, 1.0)
    x = torch.randn(4, 64, columns, generator=generator) * scale
    return 0.05 * torch.randn(rows, columns, generator=generator), LayerStatistics.from_inputs(x)


def micromix(weight, statistics, context=None, **options):
    return create_method("micromix", **options).quantize_linear(weight, statistics, context)


@pytest.mark.parametrize(
    ("channels", "middle", "highest", "segments"),
    [
        (512, 0.0, 0.0, (512, 0, 0)),
        (512, 0.1, 0.01, (256, 128, 128)),
        (512, 0.3, 0.5, (0, 256, 256)),
        (576, 0.5, 0.9, (0, 0, 576)),
        (96, 0.2, 0.1, (0, 0, 96)),
    ],
)
def test_formats_take_multiples_of_128_channels_and_the_rest_is_fp4(channels, middle, highest, segments):
    assert channel_segments(channels, middle, highest) == segments


def test_the_largest_channels_get_the_finest_format():
    weight, statistics = layer()
    context = LayerContext()
    packed = micromix(weight, statistics, context)
    size = statistics.inputs.abs().mean(dim=1).amax(dim=0)[packed.tensors()["permutation"].long()]
    assert (size[1:] >= size[:-1]).all()
    assert sum(context.facts["channels"].values()) == 512
    assert context.facts["channels"]["fp8"] >= 128


def test_shares_are_those_of_the_inputs_magnitudes():
    weight, statistics = layer()
    x = statistics.inputs.abs().reshape(-1, 512)
    top = x.amax(dim=1, keepdim=True)
    larger = float((x >= 8 / 254 * 32 / 28 * top).float().mean())
    large = float((x >= 2 / 254 * 8 / 6 * top).float().mean())
    assert micromix(weight, statistics).segments == channel_segments(512, large - larger, larger)


def test_the_released_code_counts_negative_inputs_as_small_and_exchanges_the_formats():
    weight, statistics = layer()
    x = statistics.inputs.reshape(-1, 512)
    top = x.amax(dim=1, keepdim=True)
    larger = float((x >= 8 / 254 * 32 / 28 * top).float().mean())
    large = float((x >= 2 / 254 * 8 / 6 * top).float().mean())
    faithful = micromix(weight, statistics, faithful=True)
    assert faithful.segments == channel_segments(512, larger, large - larger)
    bits = [
        create_method("micromix").nominal_bits(packed).weight for packed in (faithful, micromix(weight, statistics))
    ]
    assert bits[0] < bits[1]


def test_the_headline_counts_elements_alone_and_the_payload_a_quarter_bit_more():
    weight, statistics = layer()
    packed = micromix(weight, statistics)
    nominal = create_method("micromix").nominal_bits(packed)
    four, six, eight = packed.segments
    assert nominal.weight == (4 * four + 6 * six + 8 * eight) / 512
    assert nominal.scale == 0
    assert packed.payload_bits() == pytest.approx(nominal.weight + 0.25 + 16 / 32)  # 32 rows share the order


def test_it_rounds_inputs_and_says_that_this_is_an_emulation():
    weight, statistics = layer()
    packed = micromix(weight, statistics)
    assert packed.rounds_inputs
    x = statistics.inputs[0]
    error = float((packed.round_inputs(x) - x).norm() / x.norm())
    assert 0.001 < error < 0.1
    assert "W+A" in create_method("micromix").provenance.remark
    assert "emulated" in create_method("micromix").provenance.remark
