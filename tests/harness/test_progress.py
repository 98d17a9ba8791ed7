import io

import pytest
from rich.console import Console

from harness.progress import TerminalReporter
from harness.spec import MethodSpec, ModelSpec, RunSpec

SPEC = RunSpec(model=ModelSpec(name="m"), method=MethodSpec(name="rtn"), calibration=None, evaluations=())


@pytest.mark.parametrize(
    ("entry", "shown"),
    [
        ({"metric": "perplexity", "dataset": "wikitext2", "value": 20.1234}, "perplexity wikitext2 20.123"),
        ({"metric": "divergence", "dataset": "wikitext2", "value": 0.0123}, "KL wikitext2 0.012"),
        ({"metric": "zeroshot", "dataset": "piqa", "value": 61.54}, "piqa 61.5 %"),
    ],
)
def test_a_finished_run_says_what_it_measured(entry, shown):
    text = io.StringIO()
    reporter = TerminalReporter(Console(file=text, width=200))
    reporter.end(SPEC, "finished before", {"metrics": [entry], "ledger": {"payload_bits": 3.5}})
    assert text.getvalue() == f"  finished before: rtn() on m: {shown}; 3.500 bits per weight\n"
