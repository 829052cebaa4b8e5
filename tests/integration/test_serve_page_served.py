"""The page with the real server and a tiny model: what the scripted one promises is so."""

import socket
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from offload_moe.engine.model import Model
from offload_moe.serve.app import make_app
from tests.integration.test_serve_command import serving
from tests.support.browser import Page, keys
from tests.support.chat import chat_store
from tests.support.serving import listening, running, slowly

KEY = "sesame"
NUM_TOKENS = 12


def set_length(page: Page, num_tokens: int) -> None:
    page.click("Settings", "header")
    page.find("#max_tokens").send_keys(str(num_tokens))
    page.click("The hierarchy at work", "header")


def test_a_conversation_with_the_real_server(browser: Any, model: Model) -> None:
    with listening(model, api_key=KEY) as (host, port):
        page = Page(browser, f"http://{host}:{port}/", is_locked=True)
        page.console()  # has the 401
        page.press(KEY, keys.ENTER)
        page.wait(lambda: page.text("#state") == "ready")
        set_length(page, NUM_TOKENS)
        page.converse("Hello!")
        assert f"{NUM_TOKENS} tokens" in page.texts(".assistant .foot")[-1]
        assert "token limit" in page.texts(".assistant .foot")[-1]
        page.converse("And again?")
        assert "of the prompt kept" in page.texts(".assistant .foot")[-1]
        page.wait(lambda: "2 answered" in page.text("#live"))
        assert "layers of experts" in page.find(".map").accessible_name
        assert page.console() == []
        loaded = page.js("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert len(loaded) > 10
        assert all(address.startswith(page.address) for address in loaded)


def test_an_application_below_a_path_has_its_page(browser: Any, model: Model) -> None:
    app = make_app(model, name="tiny")
    try:
        with running(Starlette(routes=[Mount("/models/tiny", app)])) as (host, port):
            page = Page(browser, f"http://{host}:{port}/models/tiny")
            set_length(page, NUM_TOKENS)
            page.converse("Hello!")
            assert f"{NUM_TOKENS} tokens" in page.texts(".assistant .foot")[-1]
    finally:
        app.close()


def test_the_real_server_stops(browser: Any, model: Model) -> None:
    with slowly(model), listening(model) as (host, port):
        page = Page(browser, f"http://{host}:{port}/")
        set_length(page, 3000)
        page.send("Hello!")
        page.wait(lambda: page.is_writing and "answer, " in page.text("#live"))
        page.press(keys.ESCAPE)
        page.wait(lambda: "1 cancelled" in page.text("#live"))
        assert "stopped" in page.text(".assistant .foot")


@pytest.mark.slow
def test_the_page_survives_the_end_of_its_server(browser: Any, tmp_path: Path) -> None:
    """`kill -9` in the middle of an answer, and a new process at the same port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    store = chat_store(tmp_path, max_position_embeddings=4096, num_hidden_layers=64)  # seconds of answer
    with serving(store, "--port", str(port)):
        page = Page(browser, f"http://127.0.0.1:{port}/")
        set_length(page, 3000)
        page.send("Hello!")
        page.wait(lambda: "answer, " in page.text("#live"))
    page.wait(lambda: page.text("#state") == "not reachable")
    page.wait(lambda: "lost" in page.text(".fault"))
    with serving(store, "--port", str(port)):
        page.wait(lambda: page.text("#state") == "ready")
        assert page.text("#banner") == ""
        page.click("Settings", "header")
        page.find("#max_tokens").clear()
        page.find("#max_tokens").send_keys("5")
        page.click("Try again")
        page.wait(lambda: "5 tokens" in page.texts(".assistant .foot")[-1])
