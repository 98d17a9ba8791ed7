"""Write what the peers' own libraries are asked to read: `python tests/peers/make_files.py FOLDER`.

A case is a tiny model, quantized, saved and exported: `<case>/packed`, a folder for each format, and
`expected.safetensors` with token ids, the logits of the decoded model in float32 and in float16, and every decoded
weight. Old releases of transformers cannot import this project, so the tests of peers read files alone. Needs
tests/harness on PYTHONPATH.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file

from harness.checkpoint.exports import export_checkpoint
from harness.checkpoint.quantizer import packed_layers
from harness.checkpoint.read import load_checkpoint
from harness.checkpoint.write import write_checkpoint
from harness.runner import run
from harness.spec import CalibrationSpec, MethodSpec, ModelSpec, RunSpec

CASES = {
    **{f"rtn-{bits}": ("rtn", {"bits": bits, "group_size": 32}) for bits in (2, 3, 4, 8)},
    "rtn-4-symmetric": ("rtn", {"bits": 4, "group_size": 32, "symmetric": True}),
    "rtn-4-rows": ("rtn", {"bits": 4, "group_size": -1}),
    "gptq-3": ("gptq", {"bits": 3, "group_size": 32}),
    "gptq-4-act-order": ("gptq", {"bits": 4, "group_size": 32, "act_order": True}),
    "awq-4": ("awq", {"bits": 4, "group_size": 32, "search_tokens": 32}),
}


def make(folder: Path) -> None:
    corpus = folder / "story.txt"
    folder.mkdir(parents=True)
    corpus.write_text(tiny.words(1000), encoding="utf-8")
    model = tiny.save(folder / "model")
    for case, (method, options) in CASES.items():
        _make_case(folder / case, model, corpus, method, options)


def _make_case(folder: Path, model: Path, corpus: Path, method: str, options: dict[str, object]) -> None:
    spec = RunSpec(
        model=ModelSpec(name=str(model)),
        method=MethodSpec(name=method, options=options),
        calibration=CalibrationSpec(corpus=str(corpus), samples=4, context=tiny.CONTEXT),
        evaluations=(),
    )
    run(spec, keep=lambda loaded, quantized, record: write_checkpoint(folder / "packed", loaded, quantized, record))
    export_checkpoint(folder / "packed", folder / "gptq_v2", "gptq_v2")
    export_checkpoint(folder / "packed", folder / "gptq", "gptq")
    if "act_order" not in options:
        export_checkpoint(folder / "packed", folder / "compressed-tensors", "compressed-tensors")
    tokens = tiny.tokens()
    packed = load_checkpoint(folder / "packed")
    expected = {f"weight.{name}": layer.packed.decode(torch.float16) for name, layer in packed_layers(packed)}
    expected |= {"tokens": tokens}
    for dtype in (torch.float32, torch.float16):
        dense = load_checkpoint(folder / "packed", dequantize=True, dtype=dtype)
        with torch.inference_mode():
            expected[f"logits.{str(dtype).removeprefix('torch.')}"] = dense(tokens).logits.float()
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
