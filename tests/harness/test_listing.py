import io

import pytest
from rich.console import Console

from harness.catalog import corpora, models, tasks
from harness.experiments import experiment_names
from harness.listing import show


@pytest.mark.parametrize(
    ("what", "names"),
    [("models", models()), ("corpora", corpora()), ("tasks", tasks()), ("experiments", experiment_names())],
)
def test_everything_there_is_stands_in_its_list(what, names):
    text = io.StringIO()
    show(what, Console(file=text))
    first = {line.strip("│┃ ").split(" ")[0] for line in text.getvalue().splitlines()}
    assert set(names) <= first
