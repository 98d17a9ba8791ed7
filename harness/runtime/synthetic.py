"""A model of a catalogued shape with random packed weights: `--synthetic llama-2-70b`, without a download.

Speed and memory do not depend on what weights hold. One matrix of each shape is drawn and packed; every layer gets a
copy of its own, so that the memory is as large as the model's and no layer finds another's weights in a cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.runtime.architecture import Architecture
from harness.runtime.build import FUSED, BlockMade, MakeProduct, nothing_more
from harness.runtime.decoder import Block, Norm, Weights
from harness.runtime.products import DenseProduct, Product
from kernels import random_weights as random
from kernels.errors import InputError, did_you_mean
from kernels.layouts import PackedWeight
from methods import QuantizationMethod

Shape = tuple[int, int]

# Rows of OPT's table of positions, the two unused ones included.
LEARNED_POSITIONS = 2050

# What a method's packed weights look like: share of salient weights as the papers report it for LLaMA models.
_LAYOUTS: dict[str, Callable[[Any, Shape, int, torch.device], PackedWeight]] = {
    "fp16": lambda o, shape, seed, device: random.random_dense(shape, seed, device=device),
    "rtn": lambda o, shape, seed, device: _uniform(o, shape, seed, device),
    "gptq": lambda o, shape, seed, device: _uniform(o, shape, seed, device),
    "awq": lambda o, shape, seed, device: _uniform(o, shape, seed, device),
    "sage-ptq": lambda o, shape, seed, device: random.random_codebook(
        shape, seed, index_bits=o.n_lut, salient_bits=o.salient_bits, salient=o.max_salient, device=device
    ),
    "pb-llm": lambda o, shape, seed, device: random.random_partial_binary(
        shape, seed, group_size=o.group_size, salient=o.salient_fraction, salient_bits=o.salient_bits, device=device
    ),
    "billm": lambda o, shape, seed, device: random.random_residual_binary(
        shape, seed, block_size=o.block_size, device=device
    ),
    "binary": lambda o, shape, seed, device: random.random_binary(shape, seed, group_size=o.group_size, device=device),
}


def _uniform(options: Any, shape: Shape, seed: int, device: torch.device) -> PackedWeight:
    return random.random_uniform(
        shape, seed, bits=options.bits, group_size=options.group_size, symmetric=options.symmetric, device=device
    )


def synthetic_weight(method: QuantizationMethod, shape: Shape, seed: int, device: torch.device) -> PackedWeight:
    """A random weight [out_features, in_features] as `method` packs it. Raises InputError for a method without a
    form."""
    if method.name not in _LAYOUTS:
        raise InputError(f"no synthetic weights of method {method.name!r}" + did_you_mean(method.name, _LAYOUTS))
    return _LAYOUTS[method.name](method.config, shape, seed, device)


def synthetic_layer(
    architecture: Architecture, method: QuantizationMethod, device: torch.device
) -> dict[str, PackedWeight]:
    """The packed weights of one block by the names of `Architecture.linears`; all blocks are alike."""
    return {
        name: synthetic_weight(method, shape, seed, device)
        for seed, (name, shape) in enumerate(architecture.linears().items())
    }


def synthetic_weights(
    architecture: Architecture,
    layer: dict[str, PackedWeight],
    device: torch.device,
    dtype: torch.dtype,
    make: MakeProduct,
    made: BlockMade = nothing_more,
) -> Weights:
    """A whole model for a decoder. make: turns a block's packed weights into products; made: is told of each block."""
    a = architecture
    drawn = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn, dtype=dtype, device=device) / shape[-1] ** 0.5

    def norm(size: int) -> Norm:
        ones = torch.ones(size, dtype=dtype, device=device)
        return Norm(ones, torch.zeros_like(ones) if a.block == "opt" else None, a.epsilon)

    first: dict[str, Product] = {}
    for name, parts in FUSED[a.block].items():
        zero = [
            torch.zeros(layer[part].shape[0], dtype=dtype, device=device) if a.block == "opt" else None
            for part in parts
        ]
        first[name] = make(0, name, [layer[part] for part in parts], zero)
    blocks = []
    for index in range(a.layers):
        # What all are copied from is the last one's: `made` may move a block's weights elsewhere.
        last = index == a.layers - 1
        products = first if last else {name: own_copy(product) for name, product in first.items()}
        head_norms = (norm(a.head_size), norm(a.head_size)) if a.head_norms else None
        blocks.append(Block(products, norm(a.hidden), norm(a.hidden), head_norms))
        made(blocks[-1])
    embedding = normal(a.vocabulary, a.hidden)
    head = embedding if a.tied else normal(a.vocabulary, a.hidden)
    positions = normal(LEARNED_POSITIONS, a.hidden) if a.block == "opt" else None
    return Weights(a, embedding, DenseProduct(head), blocks, norm(a.hidden), positions=positions)


def own_copy(product: Any) -> Any:
    """The same product with memory of its own."""
    if hasattr(product, "parts"):
        return type(product)([own_copy(part) for part in product.parts])
    if isinstance(product, DenseProduct):
        return dataclasses.replace(product, weight=product.weight.clone())
    return dataclasses.replace(product, matrix=product.matrix.copy())
