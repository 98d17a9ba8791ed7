"""The contract of a packed weight.

What a method returns is the set of tensors that a checkpoint stores. Quality is measured on `decode()`, size is
counted from `tensors()`, and kernels read the same tensors: no mask, index, scale or zero point can be left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from kernels.errors import InputError, did_you_mean

Role = Literal["code", "sign", "index", "mask", "scale", "zero", "codebook", "outlier", "permutation", "tag"]
ROLES: tuple[Role, ...] = get_args(Role)

SCALE_DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}

_LAYOUTS: dict[str, type[PackedWeight]] = {}


class PackedWeight(ABC):
    """One weight matrix [out_features, in_features] as the byte tensors that are stored for it.

    A subclass sets `layout` (the name that checkpoints carry) and registers itself by that name. `metadata` holds
    format parameters alone (shape, widths): a handful of integers a matrix, the same for every weight of the matrix.
    Whatever varies inside the matrix is a tensor and is counted.
    """

    layout: ClassVar[str]
    # True for a format of weights and activations: `round_inputs` then belongs to the layer like its weight.
    rounds_inputs: ClassVar[bool] = False
    shape: tuple[int, int]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "layout" in cls.__dict__:
            if _LAYOUTS.get(cls.layout, cls).__qualname__ != cls.__qualname__:
                raise TypeError(f"layout {cls.layout!r} is already {_LAYOUTS[cls.layout].__qualname__}")
            _LAYOUTS[cls.layout] = cls

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that decoding needs and nothing else; the keys are the names that a checkpoint stores."""

    @abstractmethod
    def role(self, name: str) -> Role:
        """What the tensor `name` is for; the ledger sums bytes by role."""

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """Format parameters, JSON-serialisable; `from_tensors(tensors(), metadata())` gives an equal weight."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """Rebuild from what was stored. Raises InputError if names, dtypes or sizes do not fit together."""

    @abstractmethod
    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix [out_features, in_features]: exact, deterministic, the reference for every kernel.

        Products are formed in float32 from the stored constants and rounded once, to `dtype`.
        """

    def check_content(self) -> None:  # noqa: B027 - most layouts decode whatever their codes are
        """Raise InputError if the stored values cannot have been packed; called once, where a file is read.

        `from_tensors` checks names, dtypes and sizes alone: it is called wherever a weight moves.
        """

    def round_inputs(self, x: Tensor) -> Tensor:
        """The layer's inputs `x` [..., in_features] as its multiplication sees them, same shape and dtype.

        They are `x` itself unless the format quantizes activations too.
        """
        return x

    def nbytes(self) -> int:
        """Stored bytes: the sum over `tensors()`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def bytes_by_role(self) -> dict[Role, int]:
        """Stored bytes by role; the values add up to `nbytes()`."""
        totals: dict[Role, int] = {}
        for name, tensor in self.tensors().items():
            role = self.role(name)
            totals[role] = totals.get(role, 0) + tensor.numel() * tensor.element_size()
        return totals

    def payload_bits(self) -> float:
        """Stored bits per weight, everything included."""
        return 8 * self.nbytes() / (self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str) -> Self:
        """The same weight with its tensors on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return type(self).from_tensors(moved, self.metadata())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]}x{self.shape[1]}, {self.payload_bits():.3f} bits per weight)"


def layout_class(name: str) -> type[PackedWeight]:
    """The layout that checkpoints call `name`. Raises InputError for an unknown one."""
    if name not in _LAYOUTS:
        raise InputError(f"unknown layout {name!r}" + did_you_mean(name, _LAYOUTS))
    return _LAYOUTS[name]


def check_shape(metadata: Mapping[str, Any]) -> tuple[int, int]:
    """The `shape` entry of a layout's metadata as a pair of positive integers."""
    shape = metadata.get("shape")
    if not (isinstance(shape, list | tuple) and len(shape) == 2 and all(type(s) is int and s > 0 for s in shape)):
        raise InputError(f"shape={shape!r} of a packed weight; it must be two positive integers")
    return shape[0], shape[1]


def check_tensor(
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
) -> Tensor:
    """The tensor `name`, after checking that it is there with the expected shape and dtype."""
    if name not in tensors:
        raise InputError(f"tensor {name!r} of a packed weight is missing; found {sorted(tensors)}")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(
            f"tensor {name!r} of a packed weight is {str(tensor.dtype).removeprefix('torch.')} "
            f"{list(tensor.shape)}; it must be {wanted} {list(shape)}"
        )
    return tensor


def check_no_extra(tensors: Mapping[str, Tensor], known: set[str]) -> None:
    """Refuse tensors that the layout does not read: they would be stored and counted for nothing."""
    extra = set(tensors) - known
    if extra:
        raise InputError(f"packed weight has tensors that its layout does not know: {sorted(extra)}")
