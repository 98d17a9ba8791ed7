"""Move a model's weights off a quantization grid without changing its function.

A model that was stored in a block format (GGUF Q4_1, say) has weights on a grid, and a grid of the same form
reproduces them exactly: results at that many bits or more are flattered. Three exact changes take them off it:

- the gain of each norm is folded into the linear layers that read it (columns scaled),
- value and output projections: row c of v times s_c, the columns of o that read it divided by s_c,
- up and down projections of a gated MLP: row c of up times s_c, column c of down divided by s_c,

with factors s = exp(0.25 * normal), seeded. Logits stay equal to float32 rounding; that is checked here, every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.models.blocks import find_blocks
from kernels.errors import InputError

_SPREAD = 0.25
_TOLERANCE = 1e-4
_PARTS = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@torch.no_grad()
def reparameterize(model: Any, seed: int) -> None:
    """Change `model` (float32) in place. Raises InputError if it is not LLaMA-like, or if its logits change."""
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randint(0, model.config.vocab_size, (1, 64), generator=generator).to(next(model.parameters()).device)
    before = model(probe).logits.float()
    for index, block in enumerate(find_blocks(model).blocks):
        parts: dict[str, Any] = dict(block.named_modules())
        missing = [part for part in _PARTS if part not in parts]
        if missing:
            raise InputError(
                f"--reparameterize works on LLaMA-like decoder blocks; block {index} of {type(model).__name__} has no "
                f"{missing[0]}"
            )
        attention = [parts[f"self_attn.{name}_proj"] for name in "qkvo"]
        gate, up, down = (parts[f"mlp.{name}_proj"] for name in ("gate", "up", "down"))
        _fold_gain(parts["input_layernorm"], attention[:3])
        _fold_gain(parts["post_attention_layernorm"], [gate, up])
        _rescale_values(attention[2], attention[3], model.config, generator)
        _scale_rows(up, factors := _factors(up.out_features, generator))
        down.weight.div_(factors.to(down.weight))
    after = model(probe).logits.float()
    difference = float((after - before).norm() / before.norm())
    if not difference < _TOLERANCE:
        raise InputError(
            f"--reparameterize changed the logits of {type(model).__name__} by {difference:.2g} relative "
            f"(limit {_TOLERANCE:g}): its blocks are not of the form this rule knows"
        )


def _fold_gain(norm: Any, readers: list[Any]) -> None:
    for linear in readers:
        linear.weight.mul_(norm.weight.to(linear.weight))
    norm.weight.fill_(1.0)


def _rescale_values(values: Any, output: Any, config: Any, generator: torch.Generator) -> None:
    """With grouped queries a value channel is read by several heads: each of their columns takes the same factor."""
    factors = _factors(values.out_features, generator)
    head = output.in_features // config.num_attention_heads
    repeats = output.in_features // values.out_features
    _scale_rows(values, factors)
    per_column = factors.view(-1, 1, head).expand(-1, repeats, head).reshape(-1)
    output.weight.div_(per_column.to(output.weight))


def _scale_rows(linear: Any, factors: Tensor) -> None:
    linear.weight.mul_(factors.to(linear.weight)[:, None])
    if linear.bias is not None:
        linear.bias.mul_(factors.to(linear.bias))


def _factors(count: int, generator: torch.Generator) -> Tensor:
    return torch.exp(_SPREAD * torch.randn(count, generator=generator))
