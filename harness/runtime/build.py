"""Make the two arms of a comparison: a model's weights dense, and the same model with packed products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from harness.models.blocks import find_blocks
from harness.runtime.architecture import Architecture, of_config
from harness.runtime.decoder import Block, Norm, Weights
from harness.runtime.products import DenseProduct, Product, dense_product, packed_product
from kernels.errors import InputError
from kernels.layouts import DenseWeight, PackedWeight

# Products of a block, in the order of a step, and the linear layers that each of them holds.
FUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)},
    "opt": {"qkv": ("q", "k", "v"), "o": ("o",), "fc1": ("fc1",), "fc2": ("fc2",)},
}
# Where transformers keeps them in a block.
_MODULES: dict[str, dict[str, str]] = {
    "llama": {
        **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
        **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    },
    "opt": {
        **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v")},
        "o": "self_attn.out_proj",
        "fc1": "fc1",
        "fc2": "fc2",
        "attention_norm": "self_attn_layer_norm",
        "mlp_norm": "final_layer_norm",
    },
}
# OPT's table of learned positions begins with two rows that no position uses.
_OPT_OFFSET = 2

# (block number, product's name, the packed weights of its layers, their biases) -> the product.
MakeProduct = Callable[[int, str, list[PackedWeight], list[Tensor | None]], Product]
# Told of each block as soon as it is made, in order.
BlockMade = Callable[[Block], None]


class MakeWeights(Protocol):
    """Makes all of a model's weights with the products of `make`."""

    def __call__(self, make: MakeProduct, made: BlockMade = ...) -> Weights: ...


def nothing_more(block: Block) -> None:
    """The block stays as it is."""


def model_weights(
    model: Any,
    packed: Mapping[str, PackedWeight] | None,
    dtype: torch.dtype,
    make: MakeProduct | None = None,
    made: BlockMade = nothing_more,
) -> Weights:
    """The weights of a transformers model for a decoder, in `dtype`, on the device of the model.

    packed: by the name of the layer; None for the dense weights that the model holds. make: how packed weights become a
    product; `packed_products(...)` if not given.
    """
    architecture = of_config(model.config)
    base = model.model.decoder if architecture.block == "opt" else model.model
    found = find_blocks(model)
    device = model.get_input_embeddings().weight.device
    make = make or packed_products(device, dtype)
    blocks = []
    index: int
    block: Any
    for index, block in enumerate(found.blocks):
        names = _MODULES[architecture.block]
        products: dict[str, Product] = {}
        for product, parts in FUSED[architecture.block].items():
            linears = [block.get_submodule(names[part]) for part in parts]
            biases = [None if linear.bias is None else linear.bias.detach().to(dtype) for linear in linears]
            if packed is None:
                products[product] = dense_product([linear.weight.detach().to(dtype) for linear in linears], biases)
            else:
                weights = [packed[found.name(index, names[part])] for part in parts]
                products[product] = make(index, product, weights, biases)
        norms = [
            _norm(block.get_submodule(names[name]), architecture, dtype) for name in ("attention_norm", "mlp_norm")
        ]
        head_norms = None
        if architecture.head_norms:
            head_norms = (
                _norm(block.get_submodule("self_attn.q_norm"), architecture, dtype),
                _norm(block.get_submodule("self_attn.k_norm"), architecture, dtype),
            )
        blocks.append(Block(products, norms[0], norms[1], head_norms))
        made(blocks[-1])
    embedding = model.get_input_embeddings().weight.detach().to(dtype)
    head = embedding if architecture.tied else model.get_output_embeddings().weight.detach().to(dtype)
    learned = None
    if architecture.block == "opt":
        learned = base.embed_positions.weight.detach().to(dtype)[_OPT_OFFSET:]
    last = base.final_layer_norm if architecture.block == "opt" else base.norm
    return Weights(
        architecture, embedding, DenseProduct(head), blocks, _norm(last, architecture, dtype), positions=learned
    )


def layer_of(model: Any, packed: Mapping[str, PackedWeight]) -> dict[str, PackedWeight]:
    """The packed weights of block 0, by the names of `Architecture.linears`."""
    found = find_blocks(model)
    architecture = of_config(model.config)
    names = _MODULES[architecture.block]
    return {name: packed[found.name(0, names[name])] for name in architecture.linears()}


def packed_products(device: torch.device, dtype: torch.dtype) -> MakeProduct:
    """Products by kernels, on `device`, for inputs of `dtype`; layers with one input in one product where they fit."""

    def make(index: int, name: str, weights: list[PackedWeight], biases: list[Tensor | None]) -> Product:
        if all(isinstance(weight, DenseWeight) for weight in weights):
            return dense_product([weight.decode(dtype).to(device) for weight in weights], biases)
        product = packed_product(weights, biases, device, dtype)
        if product is None and len(weights) > 1:
            product = side_by_side(weights, biases, device, dtype)
        if product is None:
            layouts = ", ".join(sorted({weight.layout for weight in weights}))
            raise InputError(f"no kernel on {device} reads {name} of block {index} ({layouts}); use --runtime dense")
        return product

    return make


def side_by_side(
    weights: list[PackedWeight], biases: list[Tensor | None], device: torch.device, dtype: torch.dtype
) -> Product | None:
    """A product for each of the weights, called one after the other."""
    made = [packed_product([w], [b], device, dtype) for w, b in zip(weights, biases, strict=True)]
    parts = [product for product in made if product is not None]
    return SideBySide(parts) if len(parts) == len(weights) else None


class SideBySide:
    """Products with one input that do not fit in one launch; their outputs stand side by side."""

    def __init__(self, parts: list[Product]) -> None:
        self.parts = parts
        self.kernel = parts[0].kernel

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def __call__(self, inputs: Tensor) -> Tensor:
        return torch.cat([part(inputs) for part in self.parts], dim=-1)


def _norm(module: Any, architecture: Architecture, dtype: torch.dtype) -> Norm:
    bias = getattr(module, "bias", None)
    epsilon = getattr(module, "eps", architecture.epsilon)
    return Norm(module.weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype), epsilon)
