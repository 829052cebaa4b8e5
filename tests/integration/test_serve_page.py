"""The page in a browser: a conversation, by keyboard, with everything that may go wrong on the way."""

import threading
from contextlib import nullcontext
from typing import Any

import pytest

from tests.support.browser import Page, keys
from tests.support.page_server import Answer, FakeServer

KEPT = """
const request = indexedDB.open("offload-moe");
return new Promise((resolve) => {
  request.onsuccess = () => {
    const all = request.result.transaction("conversations").objectStore("conversations").getAll();
    all.onsuccess = () => resolve(JSON.stringify(all.result)) || request.result.close();
  };
});
"""


def hold(server: FakeServer, *pieces: str, **fields: Any) -> threading.Event:
    """The next answer shows its pieces and ends when the event is set."""
    event = threading.Event()
    server.answers.append(Answer(pieces=pieces, hold=event, **fields))
    return event


def test_an_answer_is_shown_while_it_is_written(page: Page, server: FakeServer) -> None:
    end = hold(server, "It is **being** ", "written.")
    page.send("Hello")
    page.wait(lambda: page.answer == "It is being written.")
    assert page.is_writing
    end.set()
    page.wait(lambda: not page.is_writing)
    assert "77 tokens" in page.text(".assistant .foot")
    [request] = server.requests
    assert request["model"] == "demo"
    assert request["messages"] == [{"role": "user", "content": "Hello"}]
    assert request["stream"]
    assert page.focus == "Message"


def test_the_next_question_carries_the_conversation(page: Page, server: FakeServer) -> None:
    server.answers[:] = [Answer(pieces=["One"], reasoning=["hm"]), Answer(pieces=["Two"])]
    page.converse("First")
    page.converse("Second")
    said = [(message["role"], message["content"]) for message in server.requests[1]["messages"]]
    assert said == [("user", "First"), ("assistant", "One"), ("user", "Second")]


def test_shift_and_enter_begin_a_line(page: Page, server: FakeServer) -> None:
    page.press("one")
    page.chord(keys.SHIFT, keys.ENTER)
    page.press("two", keys.ENTER)
    page.wait(lambda: server.requests)
    assert server.requests[0]["messages"][0]["content"] == "one\ntwo"
    assert page.text(".words") == "one\ntwo"


@pytest.mark.parametrize("by", ["key", "button"])
def test_an_answer_is_stopped(page: Page, server: FakeServer, by: str) -> None:
    hold(server, "As far as here")
    page.send("Go on")
    page.wait(lambda: page.answer)
    if by == "key":
        page.press(keys.ESCAPE)
    else:
        page.click("Stop")
    page.wait(lambda: not page.is_writing)
    assert server.left.wait(5)
    assert page.answer == "As far as here"
    assert "stopped" in page.text(".assistant .foot")
    assert page.converse("Again") == "An answer."


def test_the_progress_of_a_prompt_is_shown(page: Page, server: FakeServer) -> None:
    end = hold(server, progress=[(900, 400, 512)])
    page.send("A long story")
    page.wait(lambda: page.text(".waiting") == "Reading the prompt: 512 tokens of 900, 400 kept from before")
    end.set()
    page.wait(lambda: not page.is_writing)
    assert page.text(".waiting") == ""


def test_an_edited_question_is_a_branch(page: Page, server: FakeServer) -> None:
    server.answers[:] = [Answer(pieces=["first answer"]), Answer(pieces=["second answer"])]
    page.converse("first question")
    page.press(keys.ARROW_UP)
    assert page.focus == "Edit your message"
    page.chord(keys.CONTROL, "a")
    page.press("second question", keys.ENTER)
    page.wait(lambda: page.answer == "second answer" and not page.is_writing)
    assert server.requests[1]["messages"] == [{"role": "user", "content": "second question"}]
    assert page.focus == "Message"
    assert page.text(".words") == "second question"
    page.named("Previous version").send_keys(keys.ENTER)
    page.wait(lambda: page.answer == "first answer")
    assert page.text(".words") == "first question"
    assert page.focus == "Next version"


def test_escape_leaves_a_question_as_it_was(page: Page) -> None:
    page.converse("as it was")
    page.click("Edit", ".user")
    page.press("something else", keys.ESCAPE)
    assert page.text(".words") == "as it was"
    assert page.focus == "Edit"
    assert page.count("article") == 2


def test_characters_arrive_in_parts(page: Page, server: FakeServer) -> None:
    text = "Größe 重要 \N{GRINNING FACE} שלום"
    server.answers[:] = [Answer(pieces=[text], num_bytes=1)]
    assert page.converse("Hello") == text


def test_a_stream_that_ends_early_is_no_answer(page: Page, server: FakeServer) -> None:
    server.answers[:] = [Answer(pieces=["Half an"], finish=None)]
    assert page.converse("Hello") == "Half an"
    assert page.text(".fault") == "The connection to the server was lost."


def test_a_deleted_conversation_is_not_written_on(page: Page, server: FakeServer) -> None:
    hold(server, "So far")
    page.send("Hello")
    page.wait(lambda: page.answer and page.titles)
    page.find("#conversations .title").send_keys(keys.DELETE)
    page.wait(lambda: page.titles == [] and page.count("article") == 0)
    assert server.left.wait(5)
    page.find("#toast button").click()
    page.wait(lambda: page.answer == "So far")
    assert "stopped" in page.text(".assistant .foot")


def test_a_browser_that_keeps_nothing_is_said(page: Page) -> None:
    with page.lacking("Object.defineProperty(window, 'indexedDB', { value: undefined });"):
        assert page.converse("Hello") == "An answer."
        assert page.titles == ["Hello"]
        assert "keeps nothing" in page.text("nav")
        page.reload()
        assert page.titles == []


def test_another_answer_keeps_the_first(page: Page, server: FakeServer) -> None:
    server.answers[:] = [Answer(pieces=["first"]), Answer(pieces=["second"])]
    page.converse("Say it")
    page.click("Try again")
    page.wait(lambda: page.answer == "second" and not page.is_writing)
    assert server.requests[0] == server.requests[1]
    assert page.text(".assistant .pager") == "2/2"
    page.click("Previous answer")
    page.wait(lambda: page.answer == "first")


def test_reasoning_is_folded(page: Page, server: FakeServer) -> None:
    server.answers[:] = [Answer(pieces=["So it is."], reasoning=["Because of ", "*this*."])]
    page.converse("Why?")
    assert page.text("details") == "Thoughts"
    page.find("summary").send_keys(keys.ENTER)
    page.wait(lambda: page.text("details .prose") == "Because of this.")


@pytest.mark.parametrize("is_secure", [True, False])
def test_code_is_copied_as_it_is(page: Page, server: FakeServer, is_secure: bool) -> None:
    """Also where other machines see the page over plain HTTP: browsers have no clipboard for it there."""
    with (
        nullcontext()
        if is_secure
        else page.lacking("Object.defineProperty(navigator, 'clipboard', { value: undefined });")
    ):
        check_copies(page, server)


def check_copies(page: Page, server: FakeServer) -> None:
    code = "if a < b:\n    print('<b>&amp;')\n"
    server.answers[:] = [Answer(pieces=[f"Try:\n\n```python\n{code}```\n"])]
    page.converse("Code?")
    page.named("Copy the python code").send_keys(keys.ENTER)
    page.wait(lambda: page.js("return document.querySelector('#announcements').textContent") == "Copied")
    page.find("#message").click()
    page.chord(keys.CONTROL, "v")
    assert page.find("#message").get_property("value") == code.rstrip("\n")


def test_conversations_survive_a_reload(page: Page) -> None:
    page.converse("The first one")
    page.chord(keys.ALT, "n")
    page.converse("The second one")
    page.wait(lambda: page.titles == ["The second one", "The first one"])
    page.reload()
    page.wait(lambda: page.text(".words") == "The second one")
    assert page.answer == "An answer."
    page.find("#conversations li:nth-child(2) .title").click()
    page.wait(lambda: page.text(".words") == "The first one")


def test_conversations_are_kept_in_order_by_keyboard(page: Page) -> None:
    for text in ("one", "two"):
        page.converse(text)
        page.chord(keys.ALT, "n")
    page.find("#conversations .title").send_keys(keys.ARROW_DOWN)
    assert page.focus == "one"
    page.press(keys.F2)
    page.press("renamed", keys.ENTER)
    page.wait(lambda: page.titles == ["two", "renamed"] and page.focus == "renamed")
    page.press(keys.DELETE)
    page.wait(lambda: page.titles == ["two"])
    page.chord(keys.CONTROL, "z")
    page.wait(lambda: page.titles == ["two", "renamed"])
    assert page.text("#toast") == ""
    assert page.text(".words") == "one"


def test_an_answer_goes_on_while_another_conversation_is_read(page: Page, server: FakeServer) -> None:
    page.converse("The first one")
    page.chord(keys.ALT, "n")
    end = hold(server, "slow")
    page.send("The second one")
    page.wait(lambda: page.answer == "slow")
    page.find("#conversations li:nth-child(2) .title").click()
    page.wait(lambda: page.text(".words") == "The first one")
    assert page.answer == "An answer."
    end.set()
    page.wait(lambda: page.count("#conversations .writing") == 0)
    page.find("#conversations li:nth-child(1) .title").click()
    page.wait(lambda: page.answer == "slow")
    assert "77 tokens" in page.text(".assistant .foot")


def test_only_what_was_set_is_sent(page: Page, server: FakeServer) -> None:
    page.click("Settings", "header")
    assert page.find("#temperature").get_attribute("placeholder") == "0.7"
    page.find("#temperature").send_keys("0.25")
    page.find("#top_p").send_keys("7")
    page.find("#system").send_keys("Be brief.")
    assert page.find("#top_p").get_attribute("aria-invalid") == "true"
    page.reload()
    page.converse("Hello")
    request = server.requests[0]
    assert request["temperature"] == 0.25
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert not {"top_p", "top_k", "min_p", "seed", "max_tokens", "reasoning_effort"} & request.keys()


@pytest.mark.parametrize("is_late", [False, True])
def test_errors_are_the_servers_words(page: Page, server: FakeServer, is_late: bool) -> None:
    words = "The queue is full: <b>64</b> requests wait."
    server.answers[:] = [Answer(pieces=["Half"], error=words, status=200 if is_late else 429)]
    page.send("Hello")
    page.wait(lambda: page.text(".fault") == words)
    assert page.answer == ("Half" if is_late else "")
    page.click("Try again")
    page.wait(lambda: page.answer == "An answer.")


def test_the_key_is_asked_for(browser: Any, server: FakeServer) -> None:
    server.key = "secret"
    page = Page(browser, server.address, is_locked=True)
    for key in ("wrong", "secret"):
        page.wait(lambda: page.count("dialog[open]"))
        page.press(key, keys.ENTER)
    page.wait(lambda: page.text("#state") == "ready")
    assert page.converse("Hello") == "An answer."
    assert "secret" not in page.js("return JSON.stringify(localStorage)")
    page.reload()
    assert page.text("#state") == "ready"


def test_the_page_reconnects_after_the_server_was_killed(page: Page, server: FakeServer) -> None:
    page.converse("Before")
    hold(server, "The server dies in the mid")
    page.send("During")
    page.wait(lambda: page.answer.endswith("mid"))
    server.kill()
    page.wait(lambda: page.text("#banner"))
    assert page.text("#state") == "not reachable"
    assert page.answer == "The server dies in the mid"
    assert "lost" in page.text(".fault:not([hidden])")
    server.start()
    page.wait(lambda: page.text("#state") == "ready")
    assert page.text("#banner") == ""
    page.click("Try again")
    page.wait(lambda: page.answer == "An answer." and not page.is_writing)
    assert page.converse("After") == "An answer."
    assert [message["content"] for message in server.requests[-1]["messages"]][::2] == ["Before", "During", "After"]


def test_a_page_that_was_closed_shows_how_far_an_answer_came(page: Page, server: FakeServer) -> None:
    hold(server, "So far")
    page.send("Hello")
    page.wait(lambda: page.answer == "So far")
    page.wait(lambda: "So far" in page.js(KEPT))
    page.reload()
    page.wait(lambda: page.answer == "So far")
    assert not page.is_writing
    assert "closed" in page.text(".fault")


def test_two_tabs_agree(page: Page, browser: Any) -> None:
    page.converse("In the first tab")
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    try:
        page.open()
        page.wait(lambda: page.titles == ["In the first tab"])
        page.converse("In the second tab")
    finally:
        browser.close()
        browser.switch_to.window(first)
    page.wait(lambda: page.titles == ["In the second tab", "In the first tab"])
    assert page.text(".words") == "In the first tab"
