"""Write what the peers' own libraries are asked to read: `python tests/peers/make_files.py FOLDER`.

A case is a tiny model, quantized, saved and exported: `<case>/packed`, a folder for each format, and
`expected.safetensors` with token ids, the logits of the decoded model in float32 and in float16, and every decoded
weight. Old releases of transformers cannot import this project, so the tests of peers read files alone. Needs
tests/harness on PYTHONPATH.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file

from harness.checkpoint.exports import export_checkpoint
from harness.checkpoint.quantizer import packed_layers
from harness.checkpoint.read import load_checkpoint, packed_weights
from harness.checkpoint.write import write_checkpoint
from harness.runner import run
from harness.spec import CalibrationSpec, MethodSpec, ModelSpec, RunSpec
from kernels.layouts import UniformWeight

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
    if method == "awq":
        _export_to_awq(folder / "packed", folder / "gptq", folder / "awq")
    tokens = tiny.tokens()
    packed = load_checkpoint(folder / "packed")
    expected = {f"weight.{name}": layer.packed.decode(torch.float16) for name, layer in packed_layers(packed)}
    expected |= {"tokens": tokens}
    for dtype in (torch.float32, torch.float16):
        dense = load_checkpoint(folder / "packed", dequantize=True, dtype=dtype)
        with torch.inference_mode():
            expected[f"logits.{str(dtype).removeprefix('torch.')}"] = dense(tokens).logits.float()
    save_file(expected, folder / "expected.safetensors")


def _export_to_awq(packed: Path, gptq: Path, out: Path) -> None:
    """The GEMM layout of AutoAWQ 0.2.9, `awq/utils/packing_utils.py`: eight codes a word along out_features, in an
    order of their own. It is made here alone, to have a file in it."""
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def pack(codes: torch.Tensor) -> torch.Tensor:
        groups = codes.long().view(codes.shape[0], -1, 8)[:, :, order]
        return (groups << (4 * torch.arange(8))).sum(dim=-1).to(torch.uint32).view(torch.int32)

    weights = dict(packed_weights(packed))
    tensors = {
        name: tensor
        for name, tensor in load_file(gptq / "model.safetensors").items()
        if name.rpartition(".")[0] not in weights
    }
    for name, weight in weights.items():
        assert isinstance(weight, UniformWeight)
        tensors[f"{name}.qweight"] = pack(weight.codes().T)
        tensors[f"{name}.qzeros"] = pack(weight.zeros().T)
        tensors[f"{name}.scales"] = weight.scales().T.contiguous()
    shutil.copytree(gptq, out, ignore=shutil.ignore_patterns("*.safetensors", "quantize_config.json"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
