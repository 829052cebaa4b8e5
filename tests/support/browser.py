"""The page in a real Chromium without a window. Modules that import this are skipped where selenium is missing."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
keys = pytest.importorskip("selenium.webdriver.common.keys").Keys

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT_S = 30.0  # a busy machine included


@contextmanager
def chromium() -> Iterator[Any]:
    """A driver. Skips the test where Debian's chromium and chromium-driver, or their like, are not installed."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page at an address: a user's hands and eyes. A server has a port of its own, so its page begins empty."""

    def __init__(self, driver: Any, address: str, *, is_locked: bool = False) -> None:
        self.driver, self.address = driver, address
        self.emulate()
        self.resize(1280, 800)
        self.open(is_locked)

    def open(self, is_locked: bool = False) -> None:
        """is_locked: the page shows a field for the key first."""
        self.driver.get(self.address)
        self.wait(lambda: self.count("dialog[open]") if is_locked else self.text("#state") not in ("", "connecting"))

    def reload(self) -> None:
        self.driver.refresh()
        self.wait(lambda: self.text("#state") not in ("", "connecting"))

    @contextmanager
    def lacking(self, script: str) -> Iterator[None]:
        """The page in a browser that a script has changed before anything else ran."""
        command = "Page.addScriptToEvaluateOnNewDocument"
        added = self.driver.execute_cdp_cmd(command, {"source": script})
        try:
            self.reload()
            yield
        finally:
            self.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def emulate(self, **features: str) -> None:
        """Media features: prefers_color_scheme and so on. Without any: as the browser is."""
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": listed})

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], Any], seconds: float = WAIT_S) -> Any:
        """What the condition returns once it is true."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > end:
                raise AssertionError(f"waited {seconds} s; the page shows:\n{self.text('body')}")
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        """Of the first element, as it is seen; empty where none is."""
        script = (
            "const each = document.querySelector(arguments[0]); return each?.checkVisibility() ? each.innerText : ''"
        )
        return self.js(script, selector).strip()

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.innerText.trim())"
        return self.js(script, selector)

    def count(self, selector: str) -> int:
        return self.js("return document.querySelectorAll(arguments[0]).length", selector)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def named(self, name: str, within: str = "body") -> Any:
        """The last control whose accessible name begins so."""
        script = "return [...document.querySelectorAll(arguments[0])].filter((each) => each.checkVisibility()).at(-1)"
        return self.js(script, f"{within} [aria-label^='{name}']")

    def click(self, name: str, within: str = "body") -> None:
        self.js("arguments[0].click()", self.named(name, within))

    def press(self, *pressed: str) -> None:
        """Keys that go where the focus is. Modifiers stay down until the end of the call."""
        webdriver.ActionChains(self.driver, duration=0).send_keys(*pressed).perform()

    def chord(self, modifier: str, key: str) -> None:
        webdriver.ActionChains(self.driver, duration=0).key_down(modifier).send_keys(key).key_up(modifier).perform()

    @property
    def focus(self) -> str:
        """The accessible name of what has the focus, or its text."""
        element = self.driver.switch_to.active_element
        return element.accessible_name or element.text

    def send(self, text: str) -> None:
        self.find("#message").send_keys(text, keys.ENTER)

    def converse(self, text: str) -> str:
        """Send, and wait for the whole answer."""
        before = self.count("article")
        self.send(text)
        self.wait(lambda: self.count("article") == before + 2 and not self.is_writing)
        return self.answer

    @property
    def answer(self) -> str:
        """The newest one, without its foot."""
        return self.js("return [...document.querySelectorAll('.assistant > .prose')].at(-1)?.innerText.trim() ?? ''")

    @property
    def is_writing(self) -> bool:
        return self.count(".writing") > 0  # in the conversation, and in the list of conversations

    @property
    def titles(self) -> list[str]:
        return self.texts("#conversations .title")

    def console(self) -> list[str]:
        """Errors and warnings since the last call: violations of the content security policy too."""
        return [entry["message"] for entry in self.driver.get_log("browser")]
