"""The page's panel: the hierarchy at work, out of snapshots of the server."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.browser import Page, keys
from tests.support.page_server import FakeServer, Hierarchy

# Differences of two snapshots: [figures between them, activity of the experts].
FIGURES = """
const [before, after, done] = arguments;
import("./page/figures.js").then(({ between, activity }) => done([between(before, after), activity(before, after)]));
"""
PIXEL = """
const map = document.querySelector(".map");
const [x, y] = [(arguments[1] + 0.5) * map.width / 64, (arguments[0] + 0.1) * map.height / 16];
return [...map.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3);
"""


class Still(Hierarchy):
    """One snapshot again and again, as a server without requests gives; `changed` replaces parts of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asked = 0
        self.changed: dict[str, Any] = {}
        self.first = super().snapshot()

    def snapshot(self) -> dict[str, Any]:
        self.asked += 1
        return self.first | {"at_s": self.first["at_s"] + self.asked, "running": []} | self.changed


@pytest.fixture
def live() -> Hierarchy:
    return Hierarchy()


@pytest.fixture
def server(live: Hierarchy) -> Iterator[FakeServer]:
    server = FakeServer(live=live)
    yield server
    server.kill()


def figure(page: Page, label: str) -> str:
    texts = page.texts("#live dt, #live dd")  # one call: the panel is drawn anew between two
    return dict(zip(texts[::2], texts[1::2], strict=True)).get(label, "")


def number(text: str) -> float:
    return float(text.split()[0].rstrip("%").replace(",", ""))


def test_figures_are_differences_of_snapshots(page: Page, live: Hierarchy) -> None:
    before, after = live.snapshot(), live.snapshot()
    tokens = after["tokens"]["generated"] - before["tokens"]["generated"]
    before = before | {
        "at_s": after["at_s"] - 2.0,
        "experts": {**before["experts"], "hits": 0, "misses": 0, "delayed": 0},
    }
    after = after | {
        "experts": {**after["experts"], "hits": 90, "misses": 6, "delayed": 4},
        "stall_s": before["stall_s"] + 0.5,
    }
    figures, heat = page.driver.execute_async_script(FIGURES, before, after)
    assert figures["tokensPerS"] == pytest.approx(tokens / 2)
    assert figures["hitRate"] == pytest.approx(0.9)
    assert figures["misses"] == pytest.approx(6 / tokens)
    assert figures["stallMs"] == pytest.approx(500 / tokens)
    assert max(map(max, heat)) == 1
    restarted = after | {"started_s": after["started_s"] + 9}
    assert page.driver.execute_async_script(FIGURES, before, restarted)[0] is None


def test_the_hierarchy_is_shown_while_it_works(page: Page) -> None:
    page.wait(lambda: figure(page, "Tokens per second")[0].isdigit())
    assert 0 < number(figure(page, "Tokens per second")) < 100
    assert 50 < number(figure(page, "Expert hits")) <= 100
    assert figure(page, "Read from disk").endswith("iB/s")
    shown = page.text("#live")
    assert "512 RAM" in shown
    assert "expert slots in RAM\n1.57 GiB" in shown
    assert "in all\n3.36 GiB\nRAM to use\n4.00 GiB\nRAM slots full\n498 of 512" in shown
    assert "12 answered · 1 cancelled" in shown


def test_cells_are_read_by_keyboard(page: Page, live: Hierarchy) -> None:
    page.wait(lambda: page.count(".map:not([hidden])"))
    assert "16 layers of experts: 512 RAM" in page.find(".map").accessible_name
    page.js("document.querySelector('.map').focus()")
    assert page.text("#cell").startswith("Layer 0, expert 0: ")
    page.press(keys.ARROW_DOWN, keys.ARROW_RIGHT, keys.ARROW_RIGHT)
    assert page.text("#cell").startswith("Layer 1, expert 2: ")
    page.press(*[keys.ARROW_UP] * 3, *[keys.ARROW_LEFT] * 4)
    assert page.text("#cell").startswith("Layer 0, expert 0: ")


def test_a_cells_colour_is_its_tier(browser: Any) -> None:
    still = Still()
    still.changed = {"residency": ["0123" + "1" * 60, *["1" * 64] * 15]}
    server = FakeServer(live=still)
    try:
        page = Page(browser, server.address)
        page.wait(lambda: page.count(".map:not([hidden])"))
        colours = [tuple(page.js(PIXEL, 0, expert)) for expert in range(4)]
        assert len(set(colours)) == 4
        page.emulate(prefers_color_scheme="dark")
        page.wait(lambda: tuple(page.js(PIXEL, 0, 0)) != colours[0])
    finally:
        server.kill()


def test_a_model_that_is_not_loaded_is_said(browser: Any) -> None:
    server = FakeServer(live=Hierarchy(is_loaded=False))
    server.state = "unloaded"
    try:
        page = Page(browser, server.address)
        page.wait(lambda: "loads the model" in page.text("#live"))
        assert page.text("#state") == "unloaded"
        assert page.text(".map") == ""
        server.live.is_loaded = True
        server.state = "ok"
        page.wait(lambda: "512 RAM" in page.text("#live"))
    finally:
        server.kill()


def test_a_server_that_began_anew_has_no_past(browser: Any) -> None:
    """Totals that fall are no negative figures."""
    still = Still()
    server = FakeServer(live=still)
    try:
        page = Page(browser, server.address)
        page.wait(lambda: still.asked > 1)
        zero = {"prompt": 0, "cached": 0, "generated": 0}
        still.changed = {"started_s": still.started_s + 50, "tokens": zero, "stall_s": 0.0, "at_s": 0.5}
        asked = still.asked
        page.wait(lambda: still.asked > asked + 1)
        assert "-" not in "".join(page.texts("#live dd"))
    finally:
        server.kill()


def test_what_is_not_shown_is_not_asked_for(browser: Any) -> None:
    still = Still()
    server = FakeServer(live=still)
    try:
        page = Page(browser, server.address)
        page.wait(lambda: still.asked > 0)
        page.click("The hierarchy at work", "header")
        page.js("return new Promise((done) => setTimeout(done, 200))")
        asked = still.asked
        page.js("return new Promise((done) => setTimeout(done, 1500))")
        assert still.asked == asked
        page.reload()
        assert page.text("#live") == ""
    finally:
        server.kill()


def test_a_busy_figure_is_dimmed_when_nothing_runs(page: Page, server: FakeServer) -> None:
    page.wait(lambda: figure(page, "Tokens per second")[0].isdigit())
    assert page.count("#live .idle") == 0
    still = Still()
    still.changed = {"started_s": server.live.started_s, "tokens": {"prompt": 512, "cached": 0, "generated": 10**6}}
    server.live = still
    page.wait(lambda: page.count("#live .idle") == 4)
    assert figure(page, "Tokens per second")[0].isdigit()


def test_conversations_need_no_panel(page: Page, server: FakeServer) -> None:
    server.live = None  # every snapshot fails
    page.reload()
    assert page.text("#state") == "ready"
    assert page.converse("Hello") == "An answer."
