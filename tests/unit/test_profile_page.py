"""The page: well-formed, from nowhere else, with the numbers in it; its plots where they should be."""

import json
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from offload_moe.profile.page import make_page
from offload_moe.profile.plots import PLOTS
from offload_moe.profile.report import ProfileReport, make_report
from offload_moe.profile.sections import make_sections, summary
from offload_moe.profile.svg import (
    BOTTOM,
    HEIGHT,
    LABEL_STEP,
    TOP,
    Axis,
    Line,
    Mark,
    even_axis,
    heat_style,
    heatmap,
    layer_axis,
    line_chart,
    percent_axis,
    stacked_bar,
)
from tests.support.profile import METADATA, full_trace, routing_only

UNIT = Axis(label="x", low=0, high=1, ticks=[0, 1])


def quiet(phase: str, done: float = -1.0, total: float | None = None) -> None:
    pass


@pytest.fixture(scope="module")
def report() -> ProfileReport:
    return make_report(full_trace(), progress=quiet)


@pytest.fixture(scope="module")
def page(report: ProfileReport) -> str:
    return make_page(report)


def text_of(page: str) -> str:
    return " ".join(ElementTree.fromstring(page).itertext())


class TestPage:
    def test_it_is_well_formed(self, page: str) -> None:
        root = ElementTree.fromstring(page)
        assert root.tag == "html"
        assert len(root.findall(".//section")) == 6
        assert len(root.findall(".//svg")) == 9

    def test_it_needs_nothing_from_elsewhere(self, page: str) -> None:
        assert not re.search(r"https?:|//|<script|<link|<img|<iframe|@import|url\(|\bsrc=|\bhref=", page)

    def test_it_names_the_model_as_text(self, page: str) -> None:
        assert "hand &lt;made&gt;" in page
        assert "<made>" not in page

    @pytest.mark.parametrize(
        "number",
        [
            "460.00 ms per generated token, the mean of 2",
            "waiting for the link",
            "waiting for the disk",
            "62.5%",  # hit rate of generated tokens
            "Lookahead recall, the share of routed experts predicted by an earlier layer: 75.0% 1 ahead.",
            "1.18 in the mean, 1 is even",  # of 1.35 and 1
            "Never used: 1 experts",
            "31.2% at 1, 12.5% at 1.1",  # of 3/8 and 2/8, of 1/8 and 1/8
            "62.5% were used by the token before it; two tokens drawn at random share 75.0%",
            "1.08 times as often",
            "With 2 GiB more: +",
            "4 to 6 slots",
            "now: 4 slots, measured 62.5%",
        ],
    )
    def test_it_holds_the_numbers(self, page: str, number: str) -> None:
        assert number in text_of(page)

    def test_the_sentence_on_more_memory(self, report: ProfileReport, page: str) -> None:
        more = report.curves.more_memory
        assert more is not None
        assert more.saved_s is not None
        points = 100 * more.hit_rate - 100 * more.hit_rate_now
        assert points > 1
        assert f"+{points:.1f} points, about {1000 * more.saved_s:.2f} ms less per token" in text_of(page)

    def test_every_table_row_is_as_long_as_its_head(self, page: str) -> None:
        tables = ElementTree.fromstring(page).findall(".//table")
        assert len(tables) >= 6
        for table in tables:
            columns = len(table.findall("thead/tr/th"))
            assert {len(row.findall("td")) for row in table.findall("tbody/tr")} <= {columns}

    def test_a_foreign_trace_shows_what_it_has(self) -> None:
        found = make_report(routing_only(repeats=5), progress=quiet)
        text = text_of(make_page(found))
        assert "does not have the number of slots" in text
        assert "the trace has no router probabilities" in text
        assert "Parts of a token's time" not in text
        assert "0:2 1:3 5 100.0% 2.00" in " ".join(text.split())
        assert [section.key for section in make_sections(found)] == ["sizes", "load", "routing"]

    def test_every_section_has_plots(self, report: ProfileReport) -> None:
        keys = [section.key for section in make_sections(report)]
        assert keys[-1] == "guesses"  # a table alone
        for key in keys[:-1]:
            assert PLOTS[key](report), key

    def test_when_everything_fits(self) -> None:
        metadata = json.dumps({**METADATA, "num_slots": {"vram": 8, "ram": 8}})
        found = make_report(full_trace(metadata=metadata), progress=quiet)
        assert "Every expert has a slot, so more memory for experts has no effect." in summary(found)


class TestLineChart:
    def points(self, svg: str, style: str) -> list[list[float]]:
        path = re.search(rf'class="line {style}" d="M([^"]+)"', svg)
        assert path is not None
        return [[float(number) for number in place.split()] for place in path[1].split("L")]

    def test_values_are_where_the_axes_say(self) -> None:
        svg = line_chart("t", [Line(name="a", style="c0", x=[0, 0.5, 1], y=[0, 0.5, 1])], UNIT, UNIT)
        low, middle, high = self.points(svg, "c0")
        ticks = [float(y) for y in re.findall(r'class="grid" d="M\d+ ([\d.]+)H', svg)]
        assert (low[1], high[1]) == (ticks[0], ticks[1])  # zero on the lowest line, one on the highest
        assert high[1] < low[1] <= HEIGHT
        assert middle == [pytest.approx((a + b) / 2, abs=0.1) for a, b in zip(low, high, strict=True)]

    def test_a_gap_is_not_bridged(self) -> None:
        svg = line_chart("t", [Line(name="a", style="c0", x=[0, 0.3, 0.6, 1], y=[0, 1, None, 1])], UNIT, UNIT)
        assert len(self.points(svg, "c0")) == 2
        assert svg.count("<circle") == 1  # the point after the gap stands alone

    @pytest.mark.parametrize("end", [0, 0.5, 1])
    def test_names_do_not_touch_and_stay_in_the_plane(self, end: float) -> None:
        lines = [Line(name=f"n{i}", style="c0", x=[0, 1], y=[0.5, end]) for i in range(8)]
        svg = line_chart("t", lines, UNIT, UNIT)
        heights = sorted(float(y) for y in re.findall(r'class="name c0" x="\d+" y="([\d.]+)"', svg))
        assert len(heights) == 8
        assert min(b - a for a, b in pairwise(heights)) >= LABEL_STEP - 0.2
        assert heights[0] >= TOP
        assert heights[-1] <= HEIGHT - BOTTOM + 4.1  # text is set by its baseline

    def test_a_mark_and_its_dot(self) -> None:
        svg = line_chart("t", [], UNIT, UNIT, [Mark(x=0.5, text="5 < 6", dot=0.25)])
        assert "5 &lt; 6" in svg
        assert svg.count('class="dot"') == 1


class TestOtherPlots:
    def test_pieces_are_in_proportion(self) -> None:
        svg = stacked_bar("t", [("a", "c0", 1.0), ("b", "c1", 3.0)], "ms")
        widths = [
            float(width) for width in re.findall(r'height="34"', svg) and re.findall(r'y="8" width="([\d.]+)"', svg)
        ]
        assert widths[1] == pytest.approx(3 * widths[0], abs=0.2)
        assert "3.00 ms, 75.0%" in svg

    def test_heat_levels(self) -> None:
        assert heat_style(0) == "heat-none"
        assert [heat_style(value) for value in (0.1, 0.25, 0.6, 1, 1.25, 3, 4)] == [f"heat-{n}" for n in range(7)]

    def test_every_cell_is_drawn_once(self) -> None:
        svg = heatmap("t", [[0, 1, 1], [5, 1, 0]], "x", "y")
        assert {style: path.count("M") for style, path in re.findall(r'path class="([^"]+)" d="([^"]+)"', svg)} == {
            "heat-none": 2,
            "heat-3": 3,
            "heat-6": 1,
        }

    def test_row_numbers_do_not_touch(self) -> None:
        svg = heatmap("t", [[1.0] * 256] * 58, "x", "y")
        heights = [float(y) for y in re.findall(r'class="end tick"|x="50" y="([\d.]+)"', svg) if y]
        assert len(heights) > 10
        assert min(b - a for a, b in pairwise(heights)) >= 11

    @pytest.mark.parametrize(("top", "high"), [(0.024, 0.025), (7, 8), (1, 1), (100, 100), (0, 1)])
    def test_axes_end_at_round_numbers(self, top: float, high: float) -> None:
        assert even_axis("y", [top, 0]).high == pytest.approx(high)

    def test_percent_and_layer_axes(self) -> None:
        assert (percent_axis("y").low, percent_axis("y").high) == (0, 100)
        assert list(layer_axis(1).ticks) == [0]
        assert len(list(layer_axis(94).ticks)) <= 12
