"""`import harness` is all that transformers and lm-evaluation-harness need, whichever is imported first."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

ROOT = Path(__file__).resolve().parents[3]
REGISTERED = (
    "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING; print(AUTO_QUANTIZER_MAPPING['sagebench'])"
)
ORDERS = {
    "harness first": "import harness, transformers.quantizers",
    "transformers first": "import transformers.quantizers, harness",
    "quantizer first": "import harness.checkpoint.quantizer",
}


@pytest.mark.parametrize("first", ORDERS.values(), ids=ORDERS)
def test_the_order_of_imports_does_not_matter(first):
    done = subprocess.run(
        [sys.executable, "-c", f"{first}; {REGISTERED}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "SagebenchQuantizer" in done.stdout


def test_importing_harness_imports_neither_torch_nor_transformers():
    program = "import sys, harness; sys.exit(bool({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_lm_evaluation_harness_opens_the_folder_with_its_own_backend(pristine):
    opened = get_model("hf").create_from_arg_string(f"pretrained={pristine.folder},device=cpu,batch_size=1")
    pairs = [("w3 w5 w7", " w9 w2"), ("w1", " w4")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found = [likelihood for likelihood, _ in opened.loglikelihood(requests, disable_tqdm=True)]
    for (context, answer), likelihood in zip(pairs, found, strict=True):
        ids = torch.tensor([opened.tokenizer(context + answer)["input_ids"]])
        with torch.inference_mode():
            scores = opened.model(ids).logits.log_softmax(dim=-1)[0]
        start = len(opened.tokenizer(context)["input_ids"])
        wanted = sum(float(scores[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))
        assert likelihood == pytest.approx(wanted, rel=1e-5)
