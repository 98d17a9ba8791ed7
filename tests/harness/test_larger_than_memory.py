"""A model of three times the memory that a run may take is quantized and measured, with the same result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from harness.records import outcome
from harness.runner import run
from harness.spec import MethodSpec, ModelSpec, PerplexitySpec, RunSpec

_ROOT = Path(__file__).resolve().parents[2]

# A first run maps all that Python and the libraries need; the limit is what there is then, and `budget` bytes more.
_LIMITED = """
import json, resource, sys
import psutil, torch
from harness.models import load
from harness.runner import run
from harness.spec import RunSpec

small, large, budget = (json.loads(argument) for argument in sys.argv[1:])
torch.set_num_threads(1)
available, load.available_memory = load.available_memory, lambda device: 1000
run(RunSpec.model_validate_json(json.dumps(small)))
load.available_memory = available
limit = psutil.Process().memory_info().vms + budget
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    torch.empty(3 * budget, dtype=torch.uint8)
    raise SystemExit("there is no limit")
except RuntimeError:
    pass
print(json.dumps(run(RunSpec.model_validate_json(json.dumps(large)))))
"""


def spec_of(folder, corpus_file, name="rtn", **options):
    return RunSpec(
        model=ModelSpec(name=str(folder)),
        method=MethodSpec(name=name, options=options),
        calibration=None,
        evaluations=(PerplexitySpec(corpus=str(corpus_file), context=32, windows=2),),
    )


@pytest.fixture
def large(tmp_path):
    """168 MB in float32: 40 blocks of 4 MB, in files of 6 MB."""
    configuration = tiny.config("llama")
    configuration.update(
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 40, "num_attention_heads": 4}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration, dtype=torch.float32)
    model.save_pretrained(tmp_path / "large", max_shard_size="6MB")
    tiny.tokenizer().save_pretrained(tmp_path / "large")
    return tmp_path / "large"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS limits memory on Linux")
def test_a_model_of_three_times_the_memory_is_quantized_to_the_same_bits(large, tiny_folder, corpus_file, tmp_path):
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    spec = spec_of(large, corpus_file, bits=2, group_size=64)
    arguments = [spec_of(tiny_folder, corpus_file, group_size=32).model_dump_json(), spec.model_dump_json()]
    limited = subprocess.run(
        [sys.executable, "-c", _LIMITED, *arguments, str(size // 3)],
        cwd=_ROOT,
        # The limit counts addresses. glibc reserves 64 MB of them for each thread's arena, and keeps those of large
        # blocks that were freed.
        env={
            **os.environ,
            "SAGEBENCH_CACHE": str(tmp_path / "other"),
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "262144",
        },
        capture_output=True,
        text=True,
    )
    assert limited.returncode == 0, limited.stderr[-2000:]
    record = json.loads(limited.stdout)
    assert record["model"]["placement"] == "streamed from disk"
    whole = run(spec)
    assert whole["model"]["placement"] == "whole"
    assert outcome(record) == outcome(json.loads(json.dumps(whole)))
