"""Names of layers, shortened: "model.layers.3.self_attn.q_proj" is q_proj of block 3, in every model alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def kinds(layers: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The kinds of linear layers of a record's log, in model order, without the part of the name that all share."""
    return tuple(dict.fromkeys(kind(layer["name"]) for layer in layers))


def kind(name: str) -> str:
    """The last part of a layer's name."""
    return name.rsplit(".", 1)[-1]


def blocks(layers: Iterable[Mapping[str, Any]]) -> int:
    """How many decoder blocks the log covers."""
    return max((int(layer["block"]) for layer in layers), default=-1) + 1
