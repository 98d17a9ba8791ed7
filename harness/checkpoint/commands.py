"""The commands of packed checkpoints: `sagebench quantize | verify | export`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERBS = ("quantize", "verify", "export")


def add_commands(verbs: Any, add_shared: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the commands to argparse's `verbs`. add_shared: adds the options that decide the quantized weights."""
    quantize = verbs.add_parser("quantize", help="quantize a model and keep it as a packed checkpoint")
    add_shared(quantize)
    quantize.add_argument(
        "--model", required=True, metavar="M", help="model to quantize: a name, a folder, a GGUF file"
    )
    quantize.add_argument("--method", required=True, metavar="X", help="quantization method")
    quantize.add_argument(
        "--option",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="options of the method, such as bits=3",
    )
    _add_out(quantize)
    quantize.add_argument("--fresh", action="store_true", help="quantize again even if the weights are in the cache")
    quantize.add_argument("--max-shard-size", default="2GB", metavar="S", help="largest file of weights (2GB)")
    verify = verbs.add_parser("verify", help="check every file and tensor of a packed checkpoint")
    verify.add_argument("folder", type=Path)
    export = verbs.add_parser("export", help="write a packed checkpoint in another tool's format")
    export.add_argument("folder", type=Path)
    export.add_argument("--format", required=True, metavar="F", help="gptq, gptq_v2 or compressed-tensors")
    _add_out(export)


def run_command(arguments: argparse.Namespace) -> int:
    """Carry out one of VERBS; returns the exit code."""
    if arguments.verb == "quantize":
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from harness.saving import quantize

        return quantize(arguments)
    if arguments.verb == "verify":
        from harness.checkpoint.read import verify_checkpoint

        found = verify_checkpoint(arguments.folder)
        print(f"{arguments.folder}: whole; {len(found.layers)} packed layers, method {found.method}")
        return 0
    from harness.checkpoint.exports import export_checkpoint

    export_checkpoint(arguments.folder, arguments.out, arguments.format)
    print(f"written: {arguments.out}")
    return 0


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist yet")
