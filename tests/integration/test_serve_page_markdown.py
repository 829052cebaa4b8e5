"""The page's markdown in a browser: what becomes of texts, and that nothing in them becomes more than text."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.browser import Page, chromium, keys
from tests.support.page_server import Answer, FakeServer

# The structure without attributes: <p>a<b>...
RENDER = """
const [texts, done] = arguments;
import("./page/markdown.js").then(({ Markdown }) => done(texts.map((text) => {
  const box = document.createElement("div");
  new Markdown(box).update(text);
  for (const each of box.querySelectorAll("figcaption, input")) each.replaceWith(each.matches("input") ? (each.checked ? "[x]" : "[ ]") : "");
  for (const each of box.querySelectorAll("*")) for (const { name } of [...each.attributes]) if (name !== "start") each.removeAttribute(name);
  return box.innerHTML;
})));
"""
# Every beginning of a text, as if it were streamed, ends like the whole text; nothing in it does what text cannot.
STREAM = """
const [texts, done] = arguments;
import("./page/markdown.js").then(({ Markdown }) => done(texts.flatMap((text) => {
  const [grown, whole] = [document.createElement("div"), document.createElement("div")];
  const growing = new Markdown(grown);
  for (let end = 1; end <= text.length; end += 3) growing.update(text.slice(0, end));
  growing.update(text);
  new Markdown(whole).update(text);
  const bad = [...whole.querySelectorAll("*")].filter((each) =>
    !ALLOWED.has(each.localName) || [...each.attributes].some(({ name, value }) => name.startsWith("on") || name === "style" ||
      (name === "href" && !/^(https?:\\/\\/|mailto:)/.test(value))));
  return grown.innerHTML === whole.innerHTML && !bad.length ? [] : [text, grown.innerHTML, whole.innerHTML];
})));
const ALLOWED = new Set(("p h3 h4 h5 h6 hr ul ol li blockquote pre code figure figcaption span button svg path em strong del a br " +
  "div table thead tbody tr th td input").split(" "));
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

CASES = {
    "a paragraph\nof two lines\n\nanother": "<p>a paragraph\nof two lines</p><p>another</p>",
    "# Title #\n\n###### six": "<h3>Title</h3><h6>six</h6>",
    "Title\n=====\ntext": "<h3>Title</h3><p>text</p>",
    "#no heading": "<p>#no heading</p>",
    "*a* **b** ***c*** _d_ __e__ ~~f~~": "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <em>d</em> "
    "<strong>e</strong> <del>f</del></p>",
    "2 * 3 * 4 and snake_case_name and ~5": "<p>2 * 3 * 4 and snake_case_name and ~5</p>",
    "**open and *closed*": "<p>**open and <em>closed</em></p>",
    "**重要。**文字": "<p><strong>重要。</strong>文字</p>",
    "`a * b` and ``a ` b``": "<p><code>a * b</code> and <code>a ` b</code></p>",
    r"\*not\* \`code\`": "<p>*not* `code`</p>",
    "one  \ntwo\\\nthree<br>four": "<p>one<br>two<br>three<br>four</p>",
    "- a\n- b\n  - c\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
    "1. a\n2. b\n   - c\n   - d\n3. e": "<ol><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li><li>e</li></ol>",
    "3) c\n4) d": '<ol start="3"><li>c</li><li>d</li></ol>',
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "- a\ngoes on\n\nafter": "<ul><li>a\ngoes on</li></ul><p>after</p>",
    "1. a\n\n   ```sh\n   ls\n   ```\n2. b": "<ol><li><p>a</p><figure><pre><code>ls</code></pre></figure></li><li><p>b</p></li></ol>",
    "- [x] done\n- [ ] open": "<ul><li>[x]done</li><li>[ ]open</li></ul>",
    "In\n1999. No list": "<p>In\n1999. No list</p>",
    "```py\na  = 1\n\n<b>\n```": "<figure><pre><code>a  = 1\n\n&lt;b&gt;</code></pre></figure>",
    "```\nnot closed\n**yet**": "<figure><pre><code>not closed\n**yet**</code></pre></figure>",
    "````\n```\n````": "<figure><pre><code>```</code></pre></figure>",
    "> a\nb\n>\n> - c": "<blockquote><p>a\nb</p><ul><li>c</li></ul></blockquote>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "| a | b |\n|---|--:|\n| `x\\|y` | 1 |\n| 2 |\nend": "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody>"
    "<tr><td><code>x|y</code></td><td>1</td></tr><tr><td>2</td><td></td></tr></tbody></table></div><p>end</p>",
    "a | b, no table": "<p>a | b, no table</p>",
    "[a *b*](https://x.org/ 'c') <https://y.org>": "<p><a>a <em>b</em></a> <a>https://y.org</a></p>",
    "(see https://x.org/a_(b)_c).": "<p>(see <a>https://x.org/a_(b)_c</a>).</p>",
    "[a] (b) [c][d] [e](f g)": "<p>[a] (b) [c][d] [e](f g)</p>",
    "![cat](https://x.org/cat.png)": "<p><a>cat</a></p>",
    "&lt;b&gt; &amp;amp; &#65; &bogus; AT&T": "<p>&lt;b&gt; &amp;amp; A &amp;bogus; AT&amp;T</p>",
    r"\(a_1 * b_1\) $x_i$ costs $5 and $6": "<p><code>a_1 * b_1</code> <code>x_i</code> costs $5 and $6</p>",
    "<b>text</b> <script>alert(1)</script>": "<p>&lt;b&gt;text&lt;/b&gt; &lt;script&gt;alert(1)&lt;/script&gt;</p>",
    "": "",
}
ATTACKS = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "<svg onload=window.hit=1><iframe src=javascript:window.hit=1>",
    "[click](javascript:window.hit=1) [click](JaVaScRiPt:window.hit=1) [click](\tjavascript:window.hit=1)",
    "[click](<javascript:window.hit=1>) [click](java\\script:window.hit=1) [click](&#106;avascript:window.hit=1)",
    "[click](data:text/html,<script>window.hit=1</script>) [click](vbscript:window.hit=1) [click](file:///etc/passwd)",
    "<javascript:window.hit=1> ![x](javascript:window.hit=1) [x](//evil.org) [x](blob:window.hit)",
    "```\"><script>window.hit=1</script>\nx\n```",
    "```<img src=x onerror=window.hit=1>\nx\n```",
    "| <img src=x onerror=window.hit=1> |\n|---|\n| <script>window.hit=1</script> |",
    '[x](https://ok.org/" onclick="window.hit=1) [x](https://ok.org "\\" onmouseover=window.hit=1")',
    "`</code><script>window.hit=1</script>` $<img src=x onerror=window.hit=1>$",
    "&lt;script&gt;window.hit=1&lt;/script&gt; &#60;img src=x onerror=window.hit=1&#62;",
]
SLOW = ["*", "_", "**a ", "*a_b", "[", "![", "](", "[a](", "[a](b", "`", "`a``", "<", "<a", "&", "&#", "\\(", "\\[", "$", "$$a", "~~", "#", "# ",
        ">", "> ", "- ", "1. ", "-\n", "  - a\n", "|", "|a", "| a |\n|-", "http://", "https://a.b(", " ", "\t", "\\", "a\n", "![a](\"", "[a](<",
        "a*", "*a ** b", "```\n", "h", "\u202e", "重要"]  # fmt: skip


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    server = FakeServer()
    try:
        with chromium() as driver:
            yield Page(driver, server)
    finally:
        server.kill()


def run(page: Page, script: str, texts: list[str]) -> Any:
    return page.driver.execute_async_script(script, texts)


def test_every_form_becomes_its_structure(page: Page) -> None:
    shown = run(page, RENDER, list(CASES))
    assert dict(zip(CASES, shown, strict=True)) == CASES


def test_growing_texts_end_like_whole_ones(page: Page) -> None:
    words = [*(word for text in (*CASES, *ATTACKS, *SLOW) for word in text.split(" ")), "\n", "\n\n", "  ", "    ", "```", "a", "_", "|", "- "]
    random_words = random.Random(3)
    texts = [" ".join(random_words.choices(words, k=random_words.randint(1, 30))) for _ in range(300)]
    assert run(page, STREAM, [*CASES, *ATTACKS, *texts]) == []


def test_no_text_takes_long(page: Page) -> None:
    recipes = [[begin, middle, ""] for begin in SLOW for middle in ("", "x", ")", "]", "*", "\n")]
    recipes += [["*a ", "b", " a*"], ["[", "a", "](b)"], ["> - ", "a", ""], ["**a *b ", "c", "* d**"], ["  ", "- a", "\n "]]
    milliseconds = run(page, TIME, recipes)
    slowest = sorted(zip(milliseconds, recipes, strict=True))[-3:]
    assert slowest[-1][0] < 1500, slowest


def test_an_answer_cannot_do_anything(page: Page) -> None:
    page.console()
    page.server.answers[:] = [Answer(pieces=[f"{attack}\n\n" for attack in ATTACKS], reasoning=ATTACKS)]
    page.ask(ATTACKS[1])
    page.find("summary").send_keys(keys.ENTER)
    page.wait(lambda: "onerror" in page.text("details .prose"))
    assert page.titles == [ATTACKS[1]]
    page.js("document.querySelectorAll('#thread a, #thread .no-link').forEach((each) => each.removeAttribute('target'))")
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


def test_right_to_left_texts_run_so(page: Page) -> None:
    text = "זה *טקסט* עם `code`.\n\n- אחת\n- שתיים\n\n> ציטוט\n\nEnglish again.\n\n```\ncode\n```"
    page.server.answers[:] = [Answer(pieces=[text])]
    page.chord(keys.ALT, "n")
    page.ask("כתוב בעברית")
    direction = "return getComputedStyle(document.querySelector(arguments[0])).direction"
    for selector in (".words", ".prose > p", ".prose ul", ".prose blockquote", "#conversations .title"):
        assert page.js(direction, selector) == "rtl", selector
    for selector in (".prose > p:last-of-type", ".prose pre", ".prose p code"):
        assert page.js(direction, selector) == "ltr", selector


def test_long_lines_do_not_widen_the_page(page: Page) -> None:
    wide = "x" * 3000
    text = f"{wide}\n\n```\n{wide}\n```\n\n| {wide} | b |\n|---|---|\n| `{wide}` | {wide} |\n\n- `{wide}`\n\n$${wide}$$\n\nhttps://{wide}.org"
    page.server.answers[:] = [Answer(pieces=[text], reasoning=[wide])]
    page.chord(keys.ALT, "n")
    page.ask(wide[:400])
    page.js("document.querySelector('details').open = true")
    for width in (1280, 360):
        page.resize(width, 740)
        widths = "return [document.documentElement, document.querySelector('#thread')].map((e) => e.scrollWidth - e.clientWidth)"
        assert page.js(widths) == [0, 0], width
    page.resize(1280, 800)
