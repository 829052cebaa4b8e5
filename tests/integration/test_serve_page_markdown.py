"""The page's markdown in a browser: what becomes of texts, and that nothing in them becomes more than text."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.browser import Page, keys
from tests.support.markdown_texts import ATTACKS, CASES, SLOW
from tests.support.page_server import Answer, FakeServer

# The structure without attributes: <p>a<b>...
RENDER = """
const [texts, done] = arguments;
import("./page/markdown.js").then(({ Markdown }) => done(texts.map((text) => {
  const box = document.createElement("div");
  new Markdown(box).update(text);
  box.querySelectorAll("figcaption").forEach((each) => each.remove());
  box.querySelectorAll("input").forEach((each) => each.replaceWith(each.checked ? "[x]" : "[ ]"));
  for (const each of box.querySelectorAll("*")) {
    for (const name of each.getAttributeNames()) if (name !== "start") each.removeAttribute(name);
  }
  return box.innerHTML;
})));
"""
# Every beginning of a text, as if it were streamed, ends like the whole text; nothing in it does what text cannot.
STREAM = """
const [texts, done] = arguments;
const allowed = ("p h3 h4 h5 h6 hr " +
  "ul ol li blockquote pre code figure figcaption span button svg path em strong del a br " +
  "div table thead tbody tr th td input").split(" ");
const isBad = (node) => !allowed.includes(node.localName) || node.getAttributeNames().some((name) =>
  name.startsWith("on") || name === "style" || (name === "href" && !/^(https?:\\/\\/|mailto:)/.test(node.href)));
import("./page/markdown.js").then(({ Markdown }) => done(texts.flatMap((text) => {
  const [grown, whole] = [document.createElement("div"), document.createElement("div")];
  const growing = new Markdown(grown);
  for (let end = 1; end <= text.length; end += 3) growing.update(text.slice(0, end));
  growing.update(text);
  new Markdown(whole).update(text);
  const isFine = grown.innerHTML === whole.innerHTML && ![...whole.querySelectorAll("*")].some(isBad);
  return isFine ? [] : [text, grown.innerHTML, whole.innerHTML];
})));
"""
TIME = """
const [recipes, done] = arguments;
import("./page/markdown.js").then(({ Markdown }) => done(recipes.map(([begin, middle, end]) => {
  const text = begin.repeat(20000 / begin.length) + middle + end.repeat(20000 / Math.max(1, end.length));
  const began = performance.now();
  new Markdown(document.createElement("div")).update(text);
  return performance.now() - began;
})));
"""
OVERFLOWS = """
return [document.documentElement, document.querySelector("#thread")].map((each) => each.scrollWidth - each.clientWidth);
"""


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def page(browser: Any, server: FakeServer) -> Page:
    return Page(browser, server.address)


def run(page: Page, script: str, texts: list[str]) -> Any:
    return page.driver.execute_async_script(script, texts)


def test_every_form_becomes_its_structure(page: Page) -> None:
    shown = run(page, RENDER, list(CASES))
    assert dict(zip(CASES, shown, strict=True)) == CASES


def test_growing_texts_end_like_whole_ones(page: Page) -> None:
    words = [
        *(word for text in (*CASES, *ATTACKS, *SLOW) for word in text.split(" ")),
        "\n",
        "\n\n",
        "  ",
        "    ",
        "```",
        "a",
        "_",
        "|",
        "- ",
    ]
    random_words = random.Random(3)
    texts = [" ".join(random_words.choices(words, k=random_words.randint(1, 30))) for _ in range(300)]
    assert run(page, STREAM, [*CASES, *ATTACKS, *texts]) == []


def test_no_text_takes_long(page: Page) -> None:
    recipes = [[begin, middle, ""] for begin in SLOW for middle in ("x", ")")]
    recipes += [
        ["*a ", "b", " a*"],
        ["[", "a", "](b)"],
        ["> - ", "a", ""],
        ["**a *b ", "c", "* d**"],
        ["  ", "- a", "\n "],
    ]
    milliseconds = run(page, TIME, recipes)
    slowest = sorted(zip(milliseconds, recipes, strict=True))[-3:]
    assert slowest[-1][0] < 1500, slowest


def test_an_answer_cannot_do_anything(page: Page, server: FakeServer) -> None:
    page.console()
    server.answers[:] = [Answer(pieces=[f"{attack}\n\n" for attack in ATTACKS], reasoning=ATTACKS)]
    page.converse(ATTACKS[1])
    page.find("summary").send_keys(keys.ENTER)
    page.wait(lambda: "onerror" in page.text("details .prose"))
    assert page.titles == [ATTACKS[1]]
    page.js(
        "document.querySelectorAll('#thread a, #thread .no-link').forEach((each) => each.removeAttribute('target'))"
    )
    for link in page.driver.find_elements("css selector", "#thread .no-link"):
        page.js("arguments[0].click()", link)
    addresses = page.js("return [...document.querySelectorAll('#thread a')].map((each) => each.protocol)")
    assert set(addresses) <= {"https:", "http:", "mailto:"}
    assert page.count("#thread :is(script, img, iframe, object, embed, link, style, form)") == 0
    assert page.js("return window.hit") is None
    assert page.console() == []


def test_a_title_cannot_do_anything(page: Page) -> None:
    title = "<img src=x onerror=window.hit=1>\u202e\"'><script>window.hit=1</script>"
    page.find("#conversations .title").send_keys(keys.F2)
    page.chord(keys.CONTROL, "a")
    page.find(".rename").send_keys(json.loads(json.dumps(title)), keys.ENTER)
    page.wait(lambda: page.titles == [title])
    assert page.driver.title.startswith(title[:20])
    page.reload()
    assert page.titles == [title]
    assert page.count("nav :is(script, img)") == 0
    assert page.js("return window.hit") is None
    page.find("#conversations .title").send_keys(keys.DELETE)
    page.wait(lambda: page.text("#toast").startswith("Deleted “<img"))
    assert page.console() == []


def test_the_policy_stops_what_the_page_does_not_do(page: Page) -> None:
    """Were a string to become HTML by mistake, the browser would refuse."""
    refused = page.js(
        "try { document.createElement('div').innerHTML = '<b>'; return false; } catch (error) { return error.name; }"
    )
    assert refused == "TypeError"
    page.js(
        "const s = document.createElement('script'); s.id = 'inline'; try { s.textContent = 'window.hit = 1' } catch {}"
        "; document.body.append(s)"
    )
    assert page.js("return window.hit") is None
    page.console()


def test_right_to_left_texts_run_so(page: Page, server: FakeServer) -> None:
    text = "זה *טקסט* עם `code`.\n\n- אחת\n- שתיים\n\n> ציטוט\n\nEnglish again.\n\n```\ncode\n```"
    server.answers[:] = [Answer(pieces=[text])]
    page.chord(keys.ALT, "n")
    page.converse("כתוב בעברית")
    direction = "return getComputedStyle(document.querySelector(arguments[0])).direction"
    for selector in (".words", ".prose > p", ".prose ul", ".prose blockquote", "#conversations .title"):
        assert page.js(direction, selector) == "rtl", selector
    for selector in (".prose > p:last-of-type", ".prose pre", ".prose p code"):
        assert page.js(direction, selector) == "ltr", selector


def test_long_lines_do_not_widen_the_page(page: Page, server: FakeServer) -> None:
    wide = "x" * 3000
    text = f"{wide}\n\n```\n{wide}\n```\n\n| {wide} | b |\n|---|---|\n| `{wide}` | {wide} |\n\n- `{wide}`\n\n$${wide}$$\n\nhttps://{wide}.org"
    server.answers[:] = [Answer(pieces=[text], reasoning=[wide])]
    page.chord(keys.ALT, "n")
    page.converse(wide[:400])
    page.js("document.querySelector('details').open = true")
    for width in (1280, 360):
        page.resize(width, 740)
        assert page.js(OVERFLOWS) == [0, 0], width
    page.resize(1280, 800)
