"""A decode step of our own for LLaMA-like and OPT models: packed or dense products, a static key-value cache, no
copies.

The two arms of a comparison run this same code with other products. On CUDA the step reads its position from a tensor
on the device and the whole cache under a mask, so that it can be captured in a graph; on a CPU it reads the part that
is filled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.runtime.architecture import Architecture
from harness.runtime.products import Product


@dataclass
class Norm:
    """RMS norm, or layer norm where there is a bias; [hidden]."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.epsilon)
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)


@dataclass
class Block:
    """products: "qkv", "o", and "gate_up", "down" or "fc1", "fc2". head_norms: of queries and keys, or None."""

    products: dict[str, Product]
    attention_norm: Norm
    mlp_norm: Norm
    head_norms: tuple[Norm, Norm] | None = None


@dataclass
class Weights:
    """All of a model. embedding, head: [vocabulary, hidden], one tensor where they are tied. positions: learned ones
    [positions, hidden] (OPT), None with rotary ones."""

    architecture: Architecture
    embedding: Tensor
    head: Product
    blocks: list[Block]
    final_norm: Norm
    positions: Tensor | None = None

    @property
    def linear_bytes(self) -> int:
        return sum(product.nbytes for block in self.blocks for product in block.products.values())


@dataclass
class Cache:
    """keys, values: [layers][batch, kv heads, length, head size]. position: int64 [1], how many tokens it holds."""

    keys: list[Tensor]
    values: list[Tensor]
    position: Tensor
    filled: int = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    def restart(self, filled: int = 0) -> None:
        """Forget all but the first `filled` tokens."""
        self.filled = filled
        self.position.fill_(filled)


class Bands(Protocol):
    """What is told of the blocks that are worked on (see banded.py)."""

    def before(self, index: int) -> None: ...

    def after(self, index: int) -> None: ...


@dataclass
class Decoder:
    """Greedy decoding of `batch` sequences of up to `length` tokens. bands: of the banded runtime."""

    weights: Weights
    batch: int
    length: int
    bands: Bands | None = None
    cache: Cache = field(init=False)

    def __post_init__(self) -> None:
        a = self.weights.architecture
        like = self.weights.embedding
        shape = (self.batch, a.kv_heads, self.length, a.head_size)
        keys, values = (
            [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(a.layers)] for _ in range(2)
        )
        self.cache = Cache(keys, values, torch.zeros(1, dtype=torch.int64, device=like.device))
        self._every = torch.arange(self.length, device=like.device)
        self._cosine, self._sine = _rotary(a, self.length, like)
        self._on_cpu = like.device.type == "cpu"

    @torch.inference_mode()
    def prefill(self, prompt: Tensor) -> Tensor:
        """Read `prompt` [batch, tokens] into an empty cache; returns logits [batch, vocabulary] of its last
        position."""
        self.cache.restart()
        positions = self._every[: prompt.shape[1]]
        x = self._embed(prompt, positions)
        x = self._blocks(x, positions, prefill=True)
        self.cache.filled = prompt.shape[1]
        self.cache.position.fill_(prompt.shape[1])
        return self._logits(x[:, -1])

    @torch.inference_mode()
    def step(self, token: Tensor) -> Tensor:
        """One more token, [batch, 1]; returns logits [batch, vocabulary]. Nothing here waits for the device."""
        position = self.cache.position
        x = self._embed(token, position)
        x = self._blocks(x, position, prefill=False)
        self.cache.position += 1
        self.cache.filled += 1
        return self._logits(x[:, 0])

    def bytes_per_step(self, filled: int) -> int:
        """Bytes of weights and cache that a step reads when the cache holds `filled` tokens."""
        kept = filled if self._on_cpu else self.length
        cache = self.cache.nbytes * kept // self.length
        return self.weights.linear_bytes + self.weights.head.nbytes + cache

    def _blocks(self, x: Tensor, positions: Tensor, *, prefill: bool) -> Tensor:
        for index, block in enumerate(self.weights.blocks):
            if self.bands is not None:
                self.bands.before(index)
            x = self._block(index, block, x, positions, prefill=prefill)
            if self.bands is not None:
                self.bands.after(index)
        return x

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(tokens, self.weights.embedding)
        return x if self.weights.positions is None else x + self.weights.positions[positions]

    def _logits(self, x: Tensor) -> Tensor:
        return self.weights.head(self.weights.final_norm(x))

    def _block(self, index: int, block: Block, x: Tensor, positions: Tensor, *, prefill: bool) -> Tensor:
        a, products = self.weights.architecture, block.products
        attended = self._attention(index, block, products["qkv"](block.attention_norm(x)), positions, prefill=prefill)
        x = x + products["o"](attended)
        inner = block.mlp_norm(x)
        if a.block == "opt":
            return x + products["fc2"](products["fc1"](inner).relu_())
        gate, up = products["gate_up"](inner).split(a.intermediate, dim=-1)
        return x + products["down"](F.silu(gate) * up)

    def _attention(self, index: int, block: Block, qkv: Tensor, positions: Tensor, *, prefill: bool) -> Tensor:
        a = self.weights.architecture
        batch, tokens = qkv.shape[:2]
        heads = qkv.view(batch, tokens, a.heads + 2 * a.kv_heads, a.head_size)
        turned, value = heads.split([a.heads + a.kv_heads, a.kv_heads], dim=2)
        if block.head_norms is not None:
            query, key = turned.split([a.heads, a.kv_heads], dim=2)
            turned = torch.cat([block.head_norms[0](query), block.head_norms[1](key)], dim=2)
        if self.weights.positions is None:
            turned = _rotate(turned, self._cosine[positions], self._sine[positions])
        query, key = turned.transpose(1, 2).split([a.heads, a.kv_heads], dim=1)
        keys, values = self.cache.keys[index], self.cache.values[index]
        if prefill or self._on_cpu:
            start = 0 if prefill else self.cache.filled
            keys[:, :, start : start + tokens] = key
            values[:, :, start : start + tokens] = value.transpose(1, 2)
            keys, values = keys[:, :, : start + tokens], values[:, :, : start + tokens]
            grouped, causal = a.heads != a.kv_heads, prefill and tokens > 1
            found = F.scaled_dot_product_attention(query, keys, values, is_causal=causal, enable_gqa=grouped)
            found = found.transpose(1, 2)
        else:
            keys.index_copy_(2, positions, key)
            values.index_copy_(2, positions, value.transpose(1, 2))
            mask = (self._every <= positions)[None, None, None]
            # Queries that share a key head as queries of one head: no fused attention takes grouped heads with a mask,
            # and what torch falls back to copies the cache for each query head.
            query = query.reshape(batch, a.kv_heads, a.heads // a.kv_heads, a.head_size)
            found = F.scaled_dot_product_attention(query, keys, values, mask)
        return found.reshape(batch, tokens, a.heads * a.head_size)


def _rotary(a: Architecture, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, 1, head size], in float32 first; both halves of a head turn by the same angles."""
    power = torch.arange(0, a.head_size, 2, dtype=torch.float32, device=like.device) / a.head_size
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=like.device), a.rope_theta**-power)
    both = torch.cat([angle, angle], dim=-1)[:, None]
    return both.cos().to(like.dtype), both.sin().to(like.dtype)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [batch, tokens, heads, head size] turned by the angles of its positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine
