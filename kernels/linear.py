"""PackedLinear: a linear layer that holds a packed weight's tensors and nothing dense.

The tensors are buffers under the names that a checkpoint stores, so a state dict of a packed model is its file. How a
product is computed is decided in one place, `pick_product`; without a kernel the weight is decoded to the activation's
dtype and multiplied, which gives the bits of a dense layer that holds the decoded weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from kernels.errors import InputError
from kernels.layouts.base import PackedWeight, layout_class
from kernels.products import has_kernel, kernel_product

# (inputs [..., in_features], packed [out_features, in_features], bias [out_features] or None) ->
# [..., out_features], in the dtype of the inputs.
Product = Callable[[Tensor, PackedWeight, Tensor | None], Tensor]


def decode_and_multiply(inputs: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """The reference product: decode to the dtype of the inputs, then one dense product."""
    return F.linear(inputs, packed.decode(inputs.dtype), bias)


def pick_product(inputs: Tensor, packed: PackedWeight) -> Product:
    """The function that multiplies `inputs` by `packed`: the one place that chooses between kernels."""
    return kernel_product if has_kernel(inputs, packed) else decode_and_multiply


def put_decoded(linear: nn.Linear, packed: PackedWeight) -> None:
    """The decoded weight into a dense layer; where the format quantizes activations too, their rounding before it."""
    with torch.no_grad():
        linear.weight.copy_(packed.decode(linear.weight.dtype))
    if packed.rounds_inputs:
        if not hasattr(linear, "rounding"):  # put a second time: one rounding is enough
            linear.register_forward_pre_hook(lambda module, args: (module.rounding.round_inputs(args[0]), *args[1:]))
        linear.rounding = packed  # type: ignore[assignment]


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed; x [..., in_features] of any float dtype, y [..., out_features] of the same.

    Build one with `from_packed`; or from a layout, its metadata and tensors on the meta device, to be loaded later:
    `packed` checks the buffers when it is first used.
    """

    def __init__(
        self, layout: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.layout = layout
        self.metadata = dict(metadata)
        self.out_features, self.in_features = metadata["shape"]
        self.tensor_names = tuple(tensors)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._checked: PackedWeight | None = None
        for name, tensor in tensors.items():
            if not name.isidentifier() or hasattr(self, name):  # names come from files
                raise InputError(f"{name!r} is no name of a packed tensor")
            self.register_buffer(name, tensor)

    @classmethod
    def from_packed(cls, packed: PackedWeight, bias: Tensor | None = None) -> Self:
        """A layer that shares the tensors of `packed`. bias: [out_features], in the model's dtype."""
        return cls(packed.layout, packed.metadata(), packed.tensors(), bias)

    @property
    def packed(self) -> PackedWeight:
        """The weight that the buffers hold. Raises InputError if they do not fit together."""
        tensors = {name: self.get_buffer(name) for name in self.tensor_names}
        checked = self._checked
        # Loading and moving replace buffers; rebuilding checks their content, which is too slow for every product.
        if checked is None or any(held is not tensors[name] for name, held in checked.tensors().items()):
            checked = self._checked = layout_class(self.layout).from_tensors(tensors, self.metadata)
        return checked

    def forward(self, inputs: Tensor) -> Tensor:
        packed = self.packed
        if packed.rounds_inputs:
            inputs = packed.round_inputs(inputs)
        return pick_product(inputs, packed)(inputs, packed, self.bias)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A dense layer with the decoded weight, in `dtype`, on the same device."""
        packed = self.packed
        device = next(iter(packed.tensors().values())).device
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, dtype=dtype)
        linear.to_empty(device=device).requires_grad_(False)
        put_decoded(linear, packed)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of nn.Module, but what is stored keeps its dtype: `model.half()` must not round a scale."""
        before = {name: self.get_buffer(name) for name in self.tensor_names}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                self.register_buffer(name, tensor.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, layout={self.layout}, bias={self.bias is not None}"
