"""Every figure, for venues and widths: inside its page, no two texts on each other, a caption that says all."""

import dataclasses
import itertools
from importlib import import_module

import pytest
import toy

from harness.experiments import experiment_names, load_experiment
from harness.report.figures import DRAWINGS
from harness.report.figures.canvas import NothingToDrawError
from harness.report.figures.pareto import front
from harness.report.figures.style import page, typography

DRAWN = [
    (name, figure)
    for name in experiment_names()
    if not name.startswith("table4")
    for figure in load_experiment(name).figures
]
PAGES = [("neurips", "column"), ("icml", "page"), ("slides", "page")]


def draw(source, figure, where):
    module = import_module(f"harness.report.figures.{DRAWINGS[figure]}")
    return module.draw(source, where, "toy-model") if module.PER_MODEL else module.draw(source, where)


def texts(figure):
    """Every visible text with its box in pixels."""
    from matplotlib.text import Text

    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    hidden = {text for axes in figure.axes for text in _not_drawn(axes)}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in hidden:
            box = text.get_window_extent(renderer)
            if box.width > 0 and box.height > 0:
                yield text, box


def _not_drawn(axes):
    """Tick labels outside their axis' limits, which are kept but not drawn, and all of an axis that is switched off."""
    for axis in (axes.xaxis, axes.yaxis):
        drawn = {tick.label1 for tick in axis._update_ticks()} if axes.axison else set()
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            yield from {tick.label1, tick.label2} - drawn


@pytest.mark.parametrize(("style", "width"), PAGES)
@pytest.mark.parametrize(("name", "figure"), DRAWN)
def test_a_figure_fits_its_page_and_no_two_texts_overlap(name, figure, style, width):
    where = page(style, width)
    with typography(where):
        picture = draw(toy.source(name), figure, where)
        found = list(texts(picture.figure))
    assert picture.figure.get_figwidth() == pytest.approx(where.width)
    right, top = picture.figure.bbox.width, picture.figure.bbox.height
    for text, box in found:
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= right + 1 and box.y1 <= top + 1
        assert inside, f"{text.get_text()!r} leaves the page"
    for (one, first), (other, second) in itertools.combinations(found, 2):
        if one.get_rotation() == other.get_rotation() == 40:
            continue  # the boxes of slanted labels overlap, the labels do not
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert min(across, down) < 1.5, f"{one.get_text()!r} and {other.get_text()!r} overlap"


@pytest.mark.parametrize(("name", "figure"), DRAWN)
def test_every_axis_says_what_it_shows_and_the_caption_how_it_was_measured(name, figure):
    source = toy.source(name)
    with typography(page()):
        picture = draw(source, figure, page())
    texts_of_figure = [text.get_text() for text in picture.figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert any(any(word in text for word in ("bit", "erplexity", "GB", "%", "error", "KL")) for text in texts_of_figure)
    assert picture.run_keys and set(picture.run_keys) <= source.records.keys()
    said = " ".join(picture.caption)
    assert "Profile: made up." in said
    if figure in ("pareto", "ablation", "lookup-size", "corpora", "claimed-measured"):
        assert "12 of 148 windows of wikitext2, context 2048, float32" in said


@pytest.mark.parametrize(("name", "figure"), DRAWN)
def test_the_caption_names_the_model_and_the_calibration_that_were_used(name, figure):
    source = toy.source(name)
    for record in source.records.values():
        record["spec"]["calibration"] = {"corpus": "c4-sample", "samples": 8, "context": 2048}
    with typography(page()):
        said = " ".join(draw(source, figure, page()).caption)
    assert "toy-model" in said
    assert "8 x 2048 of c4-sample" in said


@pytest.mark.parametrize(("name", "figure"), DRAWN)
def test_without_a_record_there_is_no_figure_and_a_reason(name, figure):
    empty = dataclasses.replace(toy.source(name), records={})
    with typography(page()), pytest.raises(NothingToDrawError):
        draw(empty, figure, page())


def test_the_pareto_front_holds_what_nothing_else_beats():
    assert front([(3.0, 50.0), (2.0, 80.0), (3.5, 60.0), (4.0, 30.0), (3.0, 40.0)]) == [
        (2.0, 80.0), (3.0, 40.0), (4.0, 30.0),
    ]  # fmt: skip


def test_the_hidden_bits_are_the_line_between_the_hollow_and_the_filled_mark():
    with typography(page()):
        picture = draw(toy.source("table1"), "pareto", page())
    axis = picture.figure.axes[0]
    spans = {
        tuple(round(float(x), 3) for x in line.get_xdata()) for line in axis.get_lines() if len(line.get_xdata()) == 2
    }
    assert (1.06, 4.07) in spans  # SAGE-PTQ at 3 index bits: 1.04 + 0.02 claimed, 4.07 stored


def test_the_noise_floor_of_a_divergence_is_said_and_leaves_the_methods_their_room():
    with typography(page()):
        picture = draw(toy.source("table1"), "pareto", page())
    perplexity, divergence = picture.figure.axes
    assert perplexity.get_ylim()[0] < 20.0 < perplexity.get_ylim()[1]  # the unquantized model's line
    assert 0.1 < divergence.get_ylim()[0] < 0.3  # the toy's smallest divergence is 0.3
    assert "the noise floor: 1.0e-05 nats on wikitext2" in " ".join(picture.caption)


def test_variants_of_a_method_differ_in_the_picture_and_in_its_legend():
    source = toy.source("front")
    with typography(page()):
        figure = draw(source, "pareto", page()).figure
    (legend,) = figure.legends
    assert {"sage-x", "sage-x, tuned", "sage-x, self-calibrated", "sage-x, no data"} <= {
        text.get_text() for text in legend.get_texts()
    }
    fills = {line.get_fillstyle() for line in figure.axes[0].get_lines() if line.get_marker() == "p"}
    assert fills == {"full", "left", "top", "right"}


@pytest.mark.parametrize(("style", "width"), PAGES)
def test_no_label_covers_a_mark_of_the_roofline(style, width):
    where = page(style, width)
    with typography(where):
        figure = draw(toy.source("table5"), "roofline", where).figure
        labels = [box for text, box in texts(figure) if text.get_text().endswith(" %")]
    (axis,) = figure.axes
    marks = [axis.transData.transform(line.get_xydata()[0]) for line in axis.get_lines() if line.get_marker() == "D"]
    assert len(labels) == len(marks) > 3
    assert not [1 for x, y in marks for box in labels if box.x0 <= x <= box.x1 and box.y0 <= y <= box.y1]


@pytest.mark.parametrize(
    ("name", "figure"),
    [("figure5-7", "weight-distribution"), ("figure5-7", "salient-layers"), ("table1", "layer-errors")],
)
def test_decoder_blocks_are_whole(name, figure):
    with typography(page()):
        axes = draw(toy.source(name), figure, page()).figure.axes
    ticks = [tick for axis in axes if axis.get_xlabel() == "Decoder block" for tick in axis.get_xticks()]
    assert all(tick == int(tick) for tick in ticks or axes[0].get_xticks())


def test_a_figure_of_stored_weights_needs_the_record_of_the_unquantized_model():
    source = toy.source("figure5-7")
    for record in source.records.values():
        record.pop("weights", None)
    with typography(page()), pytest.raises(NothingToDrawError, match="--fresh measures them"):
        draw(source, "weight-distribution", page())
