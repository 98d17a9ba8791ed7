"""Tiny models with random weights, one for each style of decoder, a tokenizer of whole words, and text for both."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

FAMILIES = ("llama", "opt", "qwen2", "gemma2", "gemma3", "neox")
VOCABULARY = 64
CONTEXT = 32
LAYERS = 3
HIDDEN = 64
ROW = {"method": "rtn", "setting": "3 bit g32", "label": "RTN", "options": {"bits": 3, "group_size": 32}}
INTERMEDIATE = 96
# Options of methods that suit models this small; for the others the defaults do.
OPTIONS = {
    "rtn": {"bits": 3, "group_size": 32},
    "gptq": {"bits": 3, "group_size": 32},
    "awq": {"bits": 3, "group_size": 32, "search_tokens": 64},
    "pb-llm": {"group_size": 32},
    "billm": {"block_size": 32},
    "sage-ptq": {"group_count": 3, "max_salient": 0.05},
    "aptq": {"group_size": 32},
    "mg-ptq": {"group_size": 32, "average_bits": 2.5, "steps": 20},
    "slim-llm": {"bits": 3, "group_size": 16},
    "slim-llm-plus": {"bits": 3, "group_size": 16, "epochs": 2},
}
MODEL_TYPE = {
    "llama": LlamaConfig,
    "opt": OPTConfig,
    "qwen2": Qwen2Config,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "neox": GPTNeoXConfig,
}


def config(family: str) -> PreTrainedConfig:
    """The configuration of a tiny model; windows of the sliding kinds are shorter than CONTEXT, so that they matter."""
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    grouped = {"intermediate_size": INTERMEDIATE, "num_key_value_heads": 2, "initializer_range": 0.2}
    sliding = {"sliding_window": 8, "head_dim": 16, "query_pre_attn_scalar": 16}
    special = {
        "llama": grouped,
        "opt": {"ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN, "init_std": 0.2, "dropout": 0.0},
        "qwen2": grouped,
        "gemma2": {**grouped, **sliding},
        # Two kinds of rotary embedding and of mask, in turn.
        "gemma3": {**grouped, **sliding, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        "neox": {"intermediate_size": INTERMEDIATE, "initializer_range": 0.2},
    }
    return MODEL_TYPE[family](**{**shape, **special[family]})


def build(family: str = "llama", seed: int = 0) -> nn.Module:
    """A model in evaluation mode, float32; every parameter random, norm gains and biases too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def tokens(samples: int = 4, context: int = CONTEXT, seed: int = 1) -> torch.Tensor:
    """Random token ids, [samples, context]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (samples, context), generator=generator)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word "w0" .. "w61"; nothing is added at the start."""
    vocabulary = {"<unk>": 0, "<s>": 1, **{f"w{number}": number + 2 for number in range(VOCABULARY - 2)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")


def words(count: int, seed: int = 0) -> str:
    """`count` words in lines of eight: as many tokens."""
    draw = random.Random(seed)
    drawn = [f"w{min(int(draw.expovariate(0.1)), VOCABULARY - 3)}" for _ in range(count)]
    return "\n".join(" ".join(drawn[start : start + 8]) for start in range(0, count, 8))


def save(folder: Path, family: str = "llama", model: nn.Module | None = None) -> Path:
    """A model folder as users have it: safetensors, config, tokenizer."""
    (model or build(family)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_experiment(path: Path, **changes: Any) -> Path:
    """An experiment of three rows as a YAML file, with top-level keys replaced or added."""
    rows = [
        {"method": "fp16", "setting": "16 bit", "label": "FP16"},
        ROW,
        {"method": "gptq", "setting": "3 bit g32", "label": "GPTQ", "options": {"bits": 3, "group_size": 32}},
    ]
    content = {
        "name": "small", "item": "table 1", "title": "A small table", "metric": "perplexity",
        "corpora": ["wikitext2"], "models": ["opt-1.3b"], "rows": rows, **changes,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def write_gguf(path: Path) -> Path:
    """A GGUF file of a two-block LLaMA with Q4_1 linear layers and a byte-level tokenizer."""
    symbols = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    symbols += [chr(256 + number) for number in range(256 - len(symbols))]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(symbols) + 2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*symbols, "<|endoftext|>", "ab"])
    writer.add_token_types([1] * 256 + [3, 1])
    writer.add_token_merges(["a b", "a b"])  # transformers 5.17 takes a single one for a string of letters
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    draw = np.random.default_rng(0)

    def add(name: str, *shape: int, kind: GGMLQuantizationType = GGMLQuantizationType.F32) -> None:
        values = draw.normal(0.0, 0.1, shape).astype(np.float32)
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(symbols) + 2, HIDDEN)
    add("output_norm.weight", HIDDEN)
    narrow, wide = HIDDEN // 2, INTERMEDIATE
    matrices = {
        "attn_q": (HIDDEN, HIDDEN), "attn_k": (narrow, HIDDEN), "attn_v": (narrow, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (wide, HIDDEN), "ffn_up": (wide, HIDDEN), "ffn_down": (HIDDEN, wide),
    }  # fmt: skip
    for block in range(2):
        add(f"blk.{block}.attn_norm.weight", HIDDEN)
        add(f"blk.{block}.ffn_norm.weight", HIDDEN)
        for name, shape in matrices.items():
            add(f"blk.{block}.{name}.weight", *shape, kind=GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
