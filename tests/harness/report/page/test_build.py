"""The page over a results folder: whole without scripts, nothing from outside, nothing from a record as markup."""

import json
import re

import pytest
import toy

from harness.report.page.build import render_report
from harness.report.page.drilldown import slim
from harness.report.page.inline_svg import inline_svg


@pytest.fixture(scope="module")
def sources():
    return [toy.source("table1"), toy.source("figure3")]


@pytest.fixture(scope="module")
def html(sources):
    return render(sources)


def render(sources):
    records = {key: record for source in sources for key, record in source.records.items()}
    return render_report([source.plan for source in sources], records, sources[0].claims)


def embedded(html):
    return json.loads(re.search(r'<script type="application/json" id="records">(.*?)</script>', html, re.DOTALL)[1])


def test_the_same_records_give_the_same_page(sources, html):
    assert render(sources) == html


def test_every_table_and_figure_is_there_without_a_script(html):
    body = html[: html.index("<dialog")]
    for name in ("table1-toy-model", "table1-paper-1", "figure3-toy-model"):
        assert f'<section id="{name}">' in body
    for name in ("fig-table1-pareto", "fig-table1-bits-by-role", "fig-table1-layer-errors", "fig-figure3"):
        assert f'<figure id="{name}">' in body
    assert body.count("<svg ") == 6


def test_nothing_is_loaded_from_anywhere(html):
    assert "default-src 'none'" in html
    for found in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert found.startswith(("#", "data:image/png;base64,"))
    assert "@import" not in html
    assert not re.search(r"\bfetch\(|XMLHttpRequest", html)


def test_rows_and_figures_lead_to_their_runs(html, sources):
    data = embedded(html)
    targets = set(re.findall(r'href="#run-([^"]+)"', html))
    assert targets == data.keys() == {key for source in sources for key in source.records}


def test_links_inside_the_page_have_their_targets_and_identifiers_are_unique(html):
    body = html[: html.index('<script type="application/json"')]
    identifiers = re.findall(r'\bid="([^"]+)"', body)
    assert len(identifiers) == len(set(identifiers))
    for target in re.findall(r'href="#([^"]+)"', body):
        assert target.startswith("run-") or target in identifiers


def test_what_a_record_says_is_never_markup():
    source = toy.source("table6")
    nasty = '</script><img src=x onerror="alert(1)">'
    for record in source.records.values():
        record["spec"]["method"]["options"] = {"note": nasty}
        record["environment"]["cpu"] = nasty
        record["warnings"] = [nasty]
    html = render([source])
    assert "<img" not in html
    assert html.count("</script>") == 2
    assert next(iter(embedded(html).values()))["warnings"] == [nasty]


def test_the_drill_down_keeps_layers_and_leaves_out_long_lists(sources):
    record = sources[0].records["key-06"]
    record["metrics"][0]["window_nll"] = [1.0] * 148
    kept = slim(record)
    assert "window_nll" not in kept["metrics"][0]
    assert kept["metrics"][0]["value"] == record["metrics"][0]["value"]
    assert len(kept["layers"]["rows"]) == len(record["layers"])
    assert {"name", "relative_error", "groups", "salient_fraction"} <= set(kept["layers"]["head"])
    assert "weights" not in kept


def test_an_inline_figure_follows_the_theme_and_keeps_its_identifiers_apart():
    text = (
        '<?xml version="1.0"?><svg xmlns="x"><metadata>gone</metadata>'
        '<g id="a" style="stroke: #000000; fill: #ffffff"/>'
        '<use xlink:href="#a" clip-path="url(#a)"/></svg>'
    )
    found = inline_svg(text, "fig", 'a "b"')
    assert found.startswith('<svg role="img" aria-label="a &quot;b&quot;" fill="currentColor"')
    assert "metadata" not in found
    assert 'id="fig-a"' in found and 'href="#fig-a"' in found and "url(#fig-a)" in found
    assert "stroke: currentColor; fill: var(--page)" in found
