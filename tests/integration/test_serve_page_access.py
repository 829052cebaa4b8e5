"""The page for everyone: by keyboard alone, by screen reader, in the dark, on a small screen, in long conversations."""

import threading

import pytest

from tests.support.browser import Page, keys
from tests.support.page_server import Answer, FakeServer

SMALLEST_RATIO = 4.5  # of contrast: WCAG AA
ANSWER = """## Heading

A *paragraph* with `code`, a [link](https://example.org) and a quote:

> quoted

- [x] one
- [ ] two

| a | b |
|---|---|
| 1 | 2 |

```python
print("code")
```
"""
# Texts whose contrast with what lies behind them is too small: [text, ratio].
CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgba = (colour) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const over = ([r, g, b, a], under) => [r, g, b].map((value, n) => (value * a + under[n] * (255 - a)) / 255).concat(255);
const behind = (node) => {
  const below = node.parentElement ? behind(node.parentElement) : [255, 255, 255, 255];
  return over(rgba(getComputedStyle(node).backgroundColor), below);
};
const light = (colour) => {
  const shares = colour.slice(0, 3).map((value) => value / 255);
  const linear = shares.map((share) => share <= 0.04 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
const bad = [];
for (const node of document.querySelectorAll("body *")) {
  const texts = [...node.childNodes].filter((child) => child.nodeType === 3 && child.data.trim());
  const isControl = node.matches("button:not(:disabled)");
  if ((!texts.length && !isControl) || !node.checkVisibility({ opacityProperty: true })) continue;
  const ground = behind(node);
  const [one, other] = [light(over(rgba(getComputedStyle(node).color), ground)), light(ground)];
  const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  if (ratio < (texts.length ? arguments[0] : 3)) bad.push([node.textContent || node.title, ratio]);
}
return bad;
"""
ORDER = [
    *("To the message field", "Conversations", "Settings", "New conversation", "Hello"),
    *("Copy your message", "Thoughts", "Copy the python code", "Try again", "Message"),
]
RING = """
const each = document.activeElement;
const { outlineStyle, outlineWidth } = getComputedStyle(each);
const isSeen = each.checkVisibility({ visibilityProperty: true }) && each.getBoundingClientRect().width > 0;
return outlineStyle !== "none" && parseFloat(outlineWidth) >= 1 && isSeen;
"""
MOVING = """
const { transitionDuration } = getComputedStyle(document.querySelector(".icon"));
return document.getAnimations().length > 0 || transitionDuration !== "0s";
"""
OUTSIDE = """
return [...document.querySelectorAll("body *")].filter((each) => {
  const { left, right, width } = each.getBoundingClientRect();
  const mayScroll = each.closest("pre, .scroll, .unseen, .skip");
  return width && each.checkVisibility() && !mayScroll && (left < -1 || right > innerWidth + 1);
}).map((each) => each.outerHTML.slice(0, 80));
"""
COMPOSING = """
const event = { key: "Enter", bubbles: true, isComposing: true };
document.activeElement.dispatchEvent(new KeyboardEvent("keydown", event));
return new Promise((done) => setTimeout(done, 100));
"""
LONG = """
const [turns, done] = arguments;
const messages = {}, chosen = {};
let parent = "";
for (let turn = 0; turn < turns; turn += 1) {
  const id = `m${turn}`;
  const answer = `Answer **${turn}**:\\n\\n- a\\n- b\\n\\n~~~py\\nx = ${turn}\\n~~~\\n${"Some words. ".repeat(60)}`;
  const [role, content] = turn % 2 ? ["assistant", answer] : ["user", `Question ${turn}`];
  messages[id] = { id, parent, role, content, reasoning: "", at: 0, state: "done", finish: "stop" };
  chosen[parent] = id;
  parent = id;
}
const conversation = { id: "long", title: "Long", isNamed: true, updated: Date.now(), messages, chosen };
import("./page/store.js").then(async ({ openStore }) => {
  await (await openStore()).put(conversation);
  done();
});
"""


def test_the_focus_walks_through_everything_and_is_seen(page: Page, server: FakeServer) -> None:
    server.answers[:] = [Answer(pieces=[ANSWER], reasoning=["hm"])]
    page.converse("Hello")
    page.reload()
    page.wait(lambda: page.answer and page.count(".map:not([hidden])"))
    page.chord(keys.ALT, "n")
    page.find("#conversations .title").send_keys(keys.ENTER)
    page.wait(lambda: page.answer)
    page.js("document.querySelector('.skip').focus()")
    names = []
    while not page.js("return document.activeElement === document.body"):
        assert page.js(RING), page.focus
        names.append(page.focus)
        assert len(names) < 60
        page.press(keys.TAB)
    assert [name for name in names if name in ORDER] == ORDER
    assert any("layers of experts" in name for name in names)


def test_the_skip_link_leads_to_the_field(page: Page) -> None:
    page.converse("Hello")
    address = page.driver.current_url
    page.find(".skip").send_keys(keys.ENTER)
    page.press("typed")
    assert page.driver.current_url == address
    assert page.find("#message").get_property("value") == "typed"


def test_every_control_has_a_name(page: Page, server: FakeServer) -> None:
    server.answers[:] = [Answer(pieces=[ANSWER], reasoning=["hm"])]
    page.converse("Hello")
    page.click("Settings", "header")
    controls = page.driver.find_elements(
        "css selector", "button, input, textarea, select, summary, a, canvas[role], [tabindex='0']"
    )
    assert len(controls) > 20
    for control in filter(lambda control: control.is_displayed(), controls):
        assert control.accessible_name, control.get_attribute("outerHTML")
    roles = {element.aria_role for element in page.driver.find_elements("css selector", "main, nav, aside, header")}
    assert {"main", "navigation", "complementary", "banner"} <= roles


def test_what_happens_is_announced(page: Page, server: FakeServer) -> None:
    """Once, not with every token: the thread itself is no live region."""
    page.converse("Hello")
    assert page.js("return document.querySelector('#announcements').textContent") == "The answer is complete"
    assert page.js("return document.querySelector('#thread').closest('[aria-live], [role=log]')") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out(page: Page, server: FakeServer, scheme: str) -> None:
    page.emulate(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    server.answers[:] = [Answer(pieces=[ANSWER], reasoning=["hm"]), Answer(pieces=["half"], error="It failed.")]
    page.converse("Hello")
    page.send("Again")
    page.wait(lambda: page.text(".fault:not([hidden])"))
    page.js("document.querySelector('details').open = true")
    page.wait(lambda: page.texts("#live dd")[0][0].isdigit())
    page.js("return new Promise((done) => setTimeout(done, 200))")
    assert page.js(CONTRAST, SMALLEST_RATIO) == []
    page.click("Settings", "header")
    assert page.js(CONTRAST, SMALLEST_RATIO) == []


def test_nothing_moves_where_motion_is_unwelcome(page: Page, server: FakeServer) -> None:
    for motion, is_moving in (("no-preference", True), ("reduce", False)):
        page.emulate(prefers_reduced_motion=motion)
        end = threading.Event()
        server.answers[:] = [Answer(hold=end)]
        page.send("Hello")
        page.wait(lambda: page.answer)
        assert bool(page.js(MOVING)) == is_moving
        end.set()
        page.wait(lambda: not page.is_writing)


def test_a_small_screen_has_room_for_everything(page: Page, server: FakeServer) -> None:
    server.answers[:] = [Answer(pieces=[ANSWER])]
    page.resize(360, 740)
    page.reload()
    page.converse("A question that is long enough for several lines on such a small screen")
    assert page.js(OUTSIDE) == []
    for name in ("Conversations", "Settings", "The hierarchy at work"):
        page.click(name, "header")
        assert page.js(OUTSIDE) == [], name
        assert page.js("return document.querySelector('main').inert")
        page.press(keys.ESCAPE)
        assert page.focus == name
        assert not page.js("return document.querySelector('main').inert")
    page.click("Conversations", "header")
    page.find("#conversations .title").click()
    page.wait(lambda: page.text("#sidebar") == "")


def test_a_long_conversation_stays_quick(page: Page, server: FakeServer) -> None:
    page.driver.execute_async_script(LONG, 200)
    page.reload()
    milliseconds = page.js(
        "const began = performance.now(); document.querySelector('#conversations .title').click();"
        "return new Promise((done) => { const look = () => document.querySelectorAll('article').length === 200"
        " ? requestAnimationFrame(() => done(performance.now() - began)) : requestAnimationFrame(look); look(); })"
    )
    assert milliseconds < 3000
    page.js("document.querySelectorAll('article').forEach((each) => { each.isOld = true; })")
    page.js(
        "window.long = 0; new PerformanceObserver((list) => {"
        " for (const { duration } of list.getEntries()) window.long = Math.max(window.long, duration);"
        " }).observe({ entryTypes: ['longtask'] })"
    )
    server.answers[:] = [Answer(pieces=[f"Word {n} of *many*. " for n in range(300)], pause_s=0.002)]
    page.converse("One more")
    assert page.js("return [...document.querySelectorAll('article')].filter((each) => each.isOld).length") == 200
    assert page.js("return window.long") < 1000
    scroller = (
        "const each = document.querySelector('#thread'); return each.scrollHeight - each.scrollTop - each.clientHeight"
    )
    assert page.js(scroller) < 5


def test_a_reader_is_not_carried_away(page: Page, server: FakeServer) -> None:
    page.driver.execute_async_script(LONG, 20)
    page.reload()
    page.find("#conversations .title").click()
    page.wait(lambda: page.count("article") == 20)
    end = threading.Event()
    server.answers[:] = [Answer(pieces=["begun"], hold=end)]
    page.send("More")
    page.wait(lambda: page.answer == "begun")
    page.js("document.querySelector('#thread').scrollTop = 100")
    page.wait(lambda: page.named("To the newest words"))
    end.set()
    page.wait(lambda: not page.is_writing)
    assert page.js("return document.querySelector('#thread').scrollTop") == 100
    page.click("To the newest words")
    page.wait(lambda: page.js("return document.querySelector('#thread').scrollTop") > 1000)


def test_composing_a_word_sends_nothing(page: Page, server: FakeServer) -> None:
    """Enter ends the choice of a character in input methods for Chinese, Japanese and so on."""
    page.press("kana")
    page.js(COMPOSING)
    assert server.requests == []
    assert page.find("#message").get_property("value") == "kana"
