"""The page in a real browser, headless Chromium: no errors, sorting, filtering, the drill-down, a phone's width.

Needs a Chromium: in PATH, or named by SAGEBENCH_BROWSER. Everything is done by a script inside a copy of the page,
which writes what it saw into the document that the browser prints at the end.
"""

import json
import os
import re
import shutil
import subprocess

import pytest
import toy

from harness.report.page.build import render_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = os.environ.get("SAGEBENCH_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is in PATH")

WATCH = """<script>window.problems = [];
window.addEventListener("error", (event) => problems.push(String(event.message)));
window.addEventListener("securitypolicyviolation", (event) => problems.push(event.blockedURI));</script>"""
ACT = """<script>window.addEventListener("load", () => {
const table = document.querySelector("#table1-toy-model table");
const column = (n) => [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[n].textContent);
const head = (title) => [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.startsWith(title));
const press = (n) => table.tHead.rows[0].cells[n].querySelector("button").click();
const seen = {before: column(0), problems};
const measured = head("Measured");
press(measured); seen.ascending = column(measured).map(parseFloat);
press(measured); seen.descending = column(measured).map(parseFloat);
seen.sortState = table.tHead.rows[0].cells[measured].getAttribute("aria-sort");
press(0); seen.byName = column(0);
const field = document.getElementById("filter");
field.value = 'SAGE-ptq "n_lut 4"'; field.dispatchEvent(new Event("input"));
seen.filtered = column(1); seen.matches = document.getElementById("matches").textContent;
field.value = ""; field.dispatchEvent(new Event("input"));
seen.unfiltered = column(0).length;
showRun("key-07");
const dialog = document.getElementById("run");
seen.open = dialog.open; seen.run = dialog.textContent; seen.layers = dialog.querySelectorAll("tbody tr").length;
dialog.close();
document.getElementById("theme").click();
seen.theme = document.documentElement.dataset.theme;
seen.paper = getComputedStyle(document.body).backgroundColor;
seen.widths = [document.documentElement.scrollWidth, window.innerWidth];
seen.figures = [...document.querySelectorAll("figure svg")].map((svg) => svg.getBoundingClientRect().width);
const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen);
document.body.append(out);
});</script>"""


@pytest.fixture(scope="module")
def html():
    source = toy.source("table1")
    return render_report([source.plan], source.records, source.claims)


def browse(path, width):
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
        "--virtual-time-budget=20000", f"--user-data-dir={path.parent / 'profile'}", f"--window-size={width},900",
        path.as_uri(),
    ]  # fmt: skip
    said = ""
    for _ in range(3):  # a browser that does not come up on a busy machine says nothing about the page
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except subprocess.TimeoutExpired as error:
            said = str(error)
            continue
        said = done.stderr[-2000:]
        found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
        if found:
            return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
        if "</html>" in done.stdout:
            break  # it showed the page; the script in it failed
    pytest.fail(f"no answer from {BROWSER}: {said}")


@pytest.fixture(scope="module")
def seen(html, tmp_path_factory):
    """What a reader on a phone sees and can do."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    policy = html.index('<meta name="viewport"')
    acted = html[:policy] + WATCH + html[policy:]
    path.write_text(acted.replace("</body>", ACT + "</body>"), encoding="utf-8")
    return browse(path, 390)


def test_the_page_loads_without_an_error(seen):
    assert seen["problems"] == []


def test_a_click_on_a_head_sorts_by_number_and_a_second_one_turns_it_round(seen):
    numbers = [value for value in seen["ascending"] if value is not None]
    assert numbers == sorted(numbers) and len(set(numbers)) > 3
    assert [value for value in seen["descending"] if value is not None] == numbers[::-1]
    assert seen["sortState"] == "descending"


def test_names_are_sorted_as_names(seen):
    assert seen["byName"] == sorted(seen["before"], key=str.lower)


def test_the_filter_keeps_rows_with_every_word_whatever_the_case(seen):
    assert seen["filtered"] == ["n_lut 4"]
    assert re.fullmatch(r"\d+ of \d+ rows", seen["matches"])
    assert seen["unfiltered"] == len(seen["before"])


def test_a_run_opens_with_its_record(seen):
    assert seen["open"]
    for text in ("sage-ptq on toy-model", "key-07", "Stored bits by role", "index", "Some CPU"):
        assert text in seen["run"]
    assert seen["layers"] == toy.BLOCKS * len(toy.KINDS)


def test_the_theme_can_be_turned(seen):
    assert seen["theme"] in ("dark", "light")
    assert seen["paper"] == ("rgb(21, 24, 28)" if seen["theme"] == "dark" else "rgb(255, 255, 255)")


def test_a_narrow_window_scrolls_tables_and_figures_and_not_the_page(seen):
    scroll, window = seen["widths"]
    assert scroll <= window
    assert seen["figures"] and all(width >= 600 for width in seen["figures"])  # smaller could not be read
