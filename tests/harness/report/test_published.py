"""The tables that the project publishes are what their records say."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from harness.plan import TablePlan
from harness.report.saved import render_plan

PUBLISHED = sorted((Path(__file__).parents[3] / "results" / "published").iterdir())


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_tables_follow_from_their_records(folder, tmp_path):
    shutil.copytree(folder / "runs", tmp_path / "runs")
    plans = sorted((folder / "tables").glob("*.plan.json"))
    assert plans
    for plan in plans:
        for path in render_plan(TablePlan.load(plan), tmp_path, Console(file=io.StringIO())):
            assert path.read_bytes() == (folder / "tables" / path.name).read_bytes(), path.name


def test_the_table_in_the_readme_is_the_published_one():
    root = Path(__file__).parents[3]
    rows = (root / "results/published/table1-smollm2-135m/tables/table1.md").read_text(encoding="utf-8").splitlines()
    readme = (root / "README.md").read_text(encoding="utf-8")
    shown = [row for row in rows if row.startswith("| ")][:9]
    assert len(shown) == 9
    assert all(row in readme for row in shown)
