"""The network: columns are nodes, edges carry second-order information, and each node gets a width.

Source: Liu et al. 2025, MG-PTQ, arXiv 2501.18154, for the parts: column nodes with the column's weights as features,
edges from the Cholesky factor of the inverse Hessian, two graph convolutions, a feed-forward allocator, an error plus
average-bit objective with an approximate gradient. The sizes, the projection of the features, the surrogate error, its
logarithm, the price of a bit and the schedule are this project's. Trained anew for each matrix. Two dense products do
not earn a graph library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_FEATURES = 64
_HIDDEN = 64
_LEARNING_RATE = 5e-3
_TEMPERATURES = (1.0, 0.1)
# The constraint on the average (an augmented Lagrangian): weight of its square, what a bit costs at first beside the
# logarithm of the error, and how fast that price follows what is missing. Each bit divides a rounding error by four.
_AVERAGE_WEIGHT = 4.0
_FIRST_PRICE = math.log(4)
_PRICE_RATE = 0.03
# Wider graphs keep the strongest edges of each node alone.
_DENSE_NODES = 8192
_EDGES = 32


def normalized_adjacency(upper: Tensor) -> Tensor:
    """D^-1/2 (A + I) D^-1/2 with A = |U| + |U|^T without its diagonal; [n, n], sparse above 8192 nodes.

    A is scaled to a mean degree of 1: all neighbours of a node together weigh as much as the node itself. In a dense
    graph neighbours that weigh one each would average every column away.
    """
    edges = upper.abs() + upper.abs().T
    edges.fill_diagonal_(0)
    edges /= edges.sum(dim=1).mean().clamp(min=1e-30)
    if edges.shape[0] > _DENSE_NODES:
        strongest = edges.topk(_EDGES, dim=1)
        kept = torch.zeros_like(edges).scatter_(1, strongest.indices, strongest.values)
        edges = torch.maximum(kept, kept.T)
    edges.diagonal().add_(1.0)
    scale = edges.sum(dim=1).rsqrt()
    edges = scale[:, None] * edges * scale
    return edges.to_sparse() if edges.shape[0] > _DENSE_NODES else edges


def node_features(weight: Tensor, hessian: Tensor, pivots: Tensor, generator: torch.Generator) -> Tensor:
    """[n, 68]: each column's weights under a random projection to 64 numbers, and four of its sizes; standardized.

    The sizes, as logarithms: H_jj, U_jj, the column's norm, and its largest magnitude.
    """
    projection = torch.randn(weight.shape[0], _FEATURES, generator=generator).to(weight.device)
    sizes = torch.stack([hessian.diagonal(), pivots, weight.norm(dim=0), weight.abs().amax(dim=0)], dim=1)
    features = torch.cat([weight.T @ projection, sizes.clamp(min=1e-12).log()], dim=1)
    return (features - features.mean(dim=0)) / features.std(dim=0).clamp(min=1e-6)


def train_allocator(
    adjacency: Tensor,
    features: Tensor,
    errors: Tensor,
    choices: Sequence[int],
    average: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Widths [n] of the columns, from a network trained on this matrix; their average is near `average`.

    errors: [n, B], the modelled error of each column at each width. Forward the objective sees one width a column,
    backward the gradient of the softmax (straight-through), whose temperature falls from 1 to 0.1.
    """
    sizes = [(features.shape[1], _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, len(choices))]
    theta = [
        (torch.randn(size, generator=generator) * (2 / size[0]) ** 0.5).to(features.device).requires_grad_(True)
        for size in sizes[:-1]
    ]
    # The last layer starts at zero, and with it every width equally likely.
    theta += [torch.zeros(size, device=features.device, requires_grad=True) for size in (sizes[-1], len(choices))]
    bits = torch.tensor(choices, device=features.device, dtype=torch.float32)
    nearest = int((bits - average).abs().argmin())
    relative = errors / errors[:, nearest].sum().clamp(min=1e-30)
    optimizer = torch.optim.Adam(theta, lr=_LEARNING_RATE)
    # The first convolution's mixing of the features does not change while training.
    mixed = adjacency @ features
    first, last = _TEMPERATURES
    chosen = torch.full((features.shape[0],), nearest, device=features.device)
    price = torch.tensor(_FIRST_PRICE, device=features.device)
    with torch.enable_grad():
        for step in range(steps):
            hidden = torch.relu(mixed @ theta[0])
            hidden = adjacency @ (hidden @ theta[1])
            logits = torch.relu(hidden @ theta[2]) @ theta[3] + theta[4]
            temperature = first * (last / first) ** (step / max(steps - 1, 1))
            soft = torch.softmax(logits / temperature, dim=1)
            chosen = soft.argmax(dim=1)
            hard = torch.nn.functional.one_hot(chosen, len(choices)).to(soft)
            taken = hard + soft - soft.detach()
            distance = (taken @ bits).mean() - average
            # By its logarithm, so that columns do not go to one width all together: a bit more for every one of them
            # then costs about what it gains, wherever they are.
            error = (taken * relative).sum().clamp(min=1e-30).log()
            loss = error + price * distance + _AVERAGE_WEIGHT * distance.square()
            price = price + _PRICE_RATE * distance.detach()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return bits[chosen].long()
