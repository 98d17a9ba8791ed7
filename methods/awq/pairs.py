"""Which operations of a decoder block can take the scales of which linear layers, and how they take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Pair:
    """An operation, the linear layers that read its output, and the module whose output is watched, by name."""

    before: str
    readers: tuple[str, ...]
    inspected: str


# LLaMA-like blocks, OPT, GPT-NeoX. Pairs whose modules a block lacks are skipped: those layers are not scaled.
PAIRS = (
    Pair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
    Pair("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj"),
    Pair("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    Pair("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    Pair("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
    Pair("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
    Pair("self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj"),
    Pair("final_layer_norm", ("fc1",), "fc1"),
    Pair("fc1", ("fc2",), "fc2"),
    Pair("input_layernorm", ("attention.query_key_value",), "attention"),
    Pair("post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp"),
)


def foldable(modules: dict[str, Any], pair: Pair) -> bool:
    """True if a block has the pair and its operation can take the scales.

    A linear layer can only if each of its outputs is one input of its readers (no grouped queries). Where a norm of its
    own stands before the MLP (Gemma), the norm after the attention does not feed it.
    """
    if any(name not in modules for name in (pair.before, *pair.readers)):
        return False
    if pair.before == "post_attention_layernorm" and "pre_feedforward_layernorm" in modules:
        return False
    before = modules[pair.before]
    if not isinstance(before, nn.Linear):
        return hasattr(before, "weight")
    return all(before.out_features == modules[name].in_features for name in pair.readers)


def unquantized(pair: Pair, modules: dict[str, Any]) -> list[str]:
    """Parameters that folding changes and that are not packed: norm gains, and biases of the operation before."""
    before = modules[pair.before]
    names = [] if isinstance(before, nn.Linear) else [f"{pair.before}.weight"]
    return names + ([f"{pair.before}.bias"] if getattr(before, "bias", None) is not None else [])


def divide(before: Any, scales: Tensor, dtype: torch.dtype) -> None:
    """Divide the outputs of a norm or a linear layer by `scales`; what stays unquantized is rounded to `dtype`."""
    if isinstance(before, nn.Linear):
        before.weight.div_(scales.to(before.weight)[:, None])
    else:
        # Gemma's norms multiply by 1 + weight.
        offset = 1.0 if "gemma" in type(before).__name__.lower() else 0.0
        gain = (before.weight.float() + offset) / scales - offset
        before.weight.copy_(gain.to(dtype))
    if getattr(before, "bias", None) is not None:
        before.bias.copy_((before.bias.float() / scales).to(dtype))
