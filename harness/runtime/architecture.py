"""The shape of a decoder, from a model's configuration or from the catalogue: all that a decode step has to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from harness.catalog import shapes
from kernels.errors import InputError, did_you_mean

_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Architecture:
    """block: "llama" (RMS norm, rotary positions, gated MLP) or "opt" (layer norm, learned positions, ReLU MLP).
    kv_heads: of the key-value cache. head_norms: an RMS norm on each query and key head (Qwen3). positions: the most
    that the model knows, None without a limit."""

    block: Literal["llama", "opt"]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False
    head_norms: bool = False
    epsilon: float = 1e-5
    rope_theta: float = 10000.0
    positions: int | None = None

    def linears(self) -> dict[str, tuple[int, int]]:
        """[out_features, in_features] of the linear layers of a block, by name; q, k, v share their input, and so do
        gate and up."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        shared = {
            "q": (queries, self.hidden),
            "k": (keys, self.hidden),
            "v": (keys, self.hidden),
            "o": (self.hidden, queries),
        }
        if self.block == "opt":
            return {**shared, "fc1": (self.intermediate, self.hidden), "fc2": (self.hidden, self.intermediate)}
        wide = (self.intermediate, self.hidden)
        return {**shared, "gate": wide, "up": wide, "down": (self.hidden, self.intermediate)}

    @property
    def linear_weights(self) -> int:
        return self.layers * sum(rows * columns for rows, columns in self.linears().values())

    def cache_bytes(self, batch: int, length: int, element: int) -> int:
        """Bytes of a key-value cache. element: bytes a number."""
        return 2 * self.layers * batch * self.kv_heads * length * self.head_size * element


def catalogued(name: str) -> Architecture:
    """The shape called `name` in the catalogue. Raises InputError with suggestions."""
    if name not in shapes():
        raise InputError(f"no shapes of model {name!r}" + did_you_mean(name, shapes()))
    entry = shapes()[name]
    values = entry.model_dump()
    values["kv_heads"] = entry.kv_heads or entry.heads
    return Architecture(**values, head_size=entry.hidden // entry.heads)


def of_config(config: Any) -> Architecture:
    """The shape that a transformers configuration describes. Raises InputError for a kind of block that is unknown
    here."""
    kind = config.model_type
    if kind == "opt":
        if not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size:
            raise InputError(
                "decoding of OPT models with norms after their blocks, or projected embeddings, is not there"
            )
        return Architecture(
            "opt",
            config.num_hidden_layers,
            config.hidden_size,
            config.ffn_dim,
            config.num_attention_heads,
            config.num_attention_heads,
            config.hidden_size // config.num_attention_heads,
            config.vocab_size,
            tied=config.tie_word_embeddings,
            positions=config.max_position_embeddings,
        )
    if kind not in _LLAMA_LIKE:
        known = ", ".join((*_LLAMA_LIKE, "opt"))
        raise InputError(f"decoding of model type {kind!r} is not there; known: {known}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or getattr(config, "rope_scaling", None) not in (None, rope):
        raise InputError(f"decoding with rope_type {rope.get('rope_type')!r} is not there; only the default is")
    return Architecture(
        "llama",
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        config.vocab_size,
        tied=config.tie_word_embeddings,
        head_norms=kind == "qwen3",
        epsilon=config.rms_norm_eps,
        rope_theta=rope.get("rope_theta", getattr(config, "rope_theta", 10000.0)),
        positions=config.max_position_embeddings,
    )
