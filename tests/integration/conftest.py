"""Fixtures of the server's tests. Their libraries are imported where they are used: other tests need none of them."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.testclient import TestClient

    from offload_moe.engine.model import Model
    from tests.support.browser import Page
    from tests.support.page_server import FakeServer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Model]":
    """A tiny model that can be chatted with."""
    from tests.support.serving import open_tiny

    with open_tiny(tmp_path_factory.mktemp("store")) as model:
        yield model


@pytest.fixture(scope="module")
def client(model: "Model") -> "Iterator[TestClient]":
    """Of the application with the tiny model."""
    from tests.support.serving import served

    with served(model) as client:
        yield client


@pytest.fixture
def say(model: "Model") -> Iterator[Callable[[str], None]]:
    """Makes the tiny model say a text and stop."""
    from tests.support.chat import END_OF_TEXT, Scripted, ids_of

    scripts: list[Scripted] = []
    yield lambda text: scripts.append(Scripted(model.hf, [*ids_of(model.tokenizer, text), END_OF_TEXT]))
    for script in scripts:
        script.remove()


@pytest.fixture(scope="session")
def card_store(tmp_path_factory: pytest.TempPathFactory) -> "Path":
    """A tiny Qwen3-MoE, for tests of the device pass: three layers of eight experts, of which a token takes three."""
    from tests.support.card_model import store_of

    return store_of("qwen3_moe", tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from tests.support.browser import chromium

    with chromium() as driver:
        yield driver


@pytest.fixture
def server() -> "Iterator[FakeServer]":
    """The scripted one, for the page."""
    from tests.support.page_server import FakeServer

    server = FakeServer()
    yield server
    server.kill()


@pytest.fixture
def page(browser: Any, server: "FakeServer") -> "Page":
    """The page of the scripted server."""
    from tests.support.browser import Page

    return Page(browser, server.address)
