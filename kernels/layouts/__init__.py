"""Packed layouts: the byte tensors that a checkpoint holds, and how to decode them."""

from kernels.layouts.base import PackedWeight, Role, layout_class
from kernels.layouts.binary import BinaryWeight
from kernels.layouts.channel_codebook import ChannelCodebookWeight
from kernels.layouts.codebook import CodebookWeight
from kernels.layouts.dense import DenseWeight
from kernels.layouts.files import load_packed, save_packed
from kernels.layouts.microscaling import MicroscalingWeight
from kernels.layouts.mixed import MixedWeight
from kernels.layouts.partial_binary import PartialBinaryWeight
from kernels.layouts.residual_binary import ResidualBinaryWeight
from kernels.layouts.uniform import UniformWeight

__all__ = [
    "BinaryWeight",
    "ChannelCodebookWeight",
    "CodebookWeight",
    "DenseWeight",
    "MicroscalingWeight",
    "MixedWeight",
    "PackedWeight",
    "PartialBinaryWeight",
    "ResidualBinaryWeight",
    "Role",
    "UniformWeight",
    "layout_class",
    "load_packed",
    "save_packed",
]
