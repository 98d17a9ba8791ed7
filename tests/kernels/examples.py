"""Packed weights that kernels are tested on: every layout in the shapes where kernels go wrong."""

from __future__ import annotations

import torch

from kernels import random_weights as random
from kernels.layouts import PackedWeight

# (name, how to make one from a shape and a seed). Sizes of groups that share a tile, fill several, or fit neither.
LAYOUTS = {
    "codebook-4": lambda shape, seed: random.random_codebook(shape, seed),
    "codebook-3": lambda shape, seed: random.random_codebook(shape, seed, index_bits=3),
    "codebook-2-salient-5%": lambda shape, seed: random.random_codebook(
        shape, seed, index_bits=2, salient=0.05, salient_bits=2
    ),
    "codebook-none-salient": lambda shape, seed: random.random_codebook(shape, seed, salient=0),
    "codebook-float32": lambda shape, seed: random.random_codebook(shape, seed, scale_dtype=torch.float32),
    **{
        f"uniform-{bits}-g128": lambda shape, seed, bits=bits: random.random_uniform(shape, seed, bits=bits)
        for bits in range(1, 9)
    },
    "uniform-3-row": lambda shape, seed: random.random_uniform(shape, seed, bits=3, group_size=-1),
    "uniform-4-g16-symmetric": lambda shape, seed: random.random_uniform(shape, seed, group_size=16, symmetric=True),
    "uniform-4-g96": lambda shape, seed: random.random_uniform(shape, seed, group_size=96),
    "uniform-2-g300": lambda shape, seed: random.random_uniform(shape, seed, bits=2, group_size=300),
    "uniform-4-act-order": lambda shape, seed: random.random_uniform(shape, seed, permuted=True),
    "uniform-mixed": lambda shape, seed: random.random_uniform(
        shape, seed, bits=[(1, 2, 4, 3, 6)[group % 5] for group in range(-(-shape[1] // 64))], group_size=64
    ),
    "binary-g128": lambda shape, seed: random.random_binary(shape, seed),
    "binary-row-no-mean": lambda shape, seed: random.random_binary(shape, seed, group_size=-1, means=False),
    "binary-bfloat16": lambda shape, seed: random.random_binary(shape, seed, scale_dtype=torch.bfloat16),
    "partial-g128": lambda shape, seed: random.random_partial_binary(shape, seed),
    "partial-row": lambda shape, seed: random.random_partial_binary(shape, seed, group_size=-1),
    "partial-g300": lambda shape, seed: random.random_partial_binary(shape, seed, group_size=300),
    "residual-128": lambda shape, seed: random.random_residual_binary(shape, seed),
    "residual-100": lambda shape, seed: random.random_residual_binary(shape, seed, block_size=100, salient=0.3),
    "residual-all-columns": lambda shape, seed: random.random_residual_binary(shape, seed, block_size=1 << 20),
    "residual-none-salient": lambda shape, seed: random.random_residual_binary(shape, seed, salient=0),
}

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def make(name: str, shape: tuple[int, int], seed: int = 0) -> PackedWeight:
    return LAYOUTS[name](shape, seed)


def exact_product(weight: PackedWeight, inputs: torch.Tensor) -> torch.Tensor:
    """float64: inputs times the decoded weight."""
    return inputs.double() @ weight.decode(torch.float32).double().T


def check_product(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the tolerance of the dtype of `found`, as a whole and in every entry; NaN never passes."""
    tolerance = TOLERANCE[found.dtype]
    error = found.double() - expected
    assert error.norm() <= tolerance * expected.norm()
    # The norm alone hides one wrong row.
    assert bool((error.abs() <= 8 * tolerance * expected.square().mean().sqrt()).all())
