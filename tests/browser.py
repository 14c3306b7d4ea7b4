"""Chromium, driven by selenium through chromedriver: Debian's packages, which fit each other.

`python tests/browser.py` says what is missing, and fails.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()

SECONDS = 20

CONTROL, ENTER, SPACE, TAB = "\ue009", "\ue007", "\ue00d", "\ue004"
"""WebDriver's names of keys."""


def missing() -> str | None:
    """What has to be installed to run the tests in a browser; None: nothing."""
    if importlib.util.find_spec("selenium") is None:
        return 'selenium is missing: pip install ".[browser-test]"'
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        return (
            "Chromium is missing: apt-get install --no-install-recommends chromium chromium-driver"
        )
    return None


class Browser:
    """A browser with one tab."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def open(self, url: str) -> None:
        """Open a page; its script has run when this returns."""
        self._driver.get(url)

    def all(self, selector: str) -> list[Any]:
        """The visible elements of a CSS selector."""
        found = self._driver.find_elements("css selector", selector)
        return [element for element in found if element.is_displayed()]

    def one(self, selector: str) -> Any:
        """The only visible element of a CSS selector, once there is one."""
        self.wait(lambda: len(self.all(selector)) == 1)
        return self.all(selector)[0]

    def texts(self, selector: str) -> list[str]:
        """The texts of the visible elements of a CSS selector."""
        # At once: the page may replace the elements at any time.
        found: list[str] = self.script(
            f"[...document.querySelectorAll({json.dumps(selector)})]"
            ".filter(element => element.checkVisibility()).map(element => element.innerText)"
        )
        return found

    def write(self, selector: str, text: str) -> None:
        """Type into a field, instead of what it holds."""
        field = self.one(selector)
        field.clear()
        field.send_keys(text)

    def paste(self, selector: str, text: str) -> None:
        """Replace what a field holds at once; typing takes 5 ms a character."""
        self.script(
            f"(field => {{ field.value = {json.dumps(text)};"
            " field.dispatchEvent(new Event('input', {bubbles: true})) })"
            f"(document.querySelector({json.dumps(selector)}))"
        )

    def press(self, *keys: str) -> None:
        """Press keys at once, wherever the focus is."""
        from selenium.webdriver import ActionChains

        actions = ActionChains(self._driver)
        for key in keys:
            actions.key_down(key)
        for key in reversed(keys):
            actions.key_up(key)
        actions.perform()

    def point(self, selector: str) -> None:
        """Move the pointer onto an element."""
        from selenium.webdriver import ActionChains

        ActionChains(self._driver).move_to_element(self.all(selector)[0]).perform()

    def script(self, source: str) -> Any:
        """The value of an expression of JavaScript."""
        return self._driver.execute_script(f"return {source}")

    def focused(self) -> str:
        """The id or type of the element with the focus."""
        found: str = self.script("document.activeElement.id || document.activeElement.type")
        return found

    def wait(self, condition: Callable[[], Any]) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, f"not within {SECONDS} s"
            time.sleep(0.01)

    def resize(self, width: int, height: int) -> None:
        """Set the size of the viewport in CSS pixels, as on a phone."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme: str) -> None:
        """Set the system's colour scheme: light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def drop(self, path: Path, selector: str) -> None:
        """Drop a file onto an element."""
        place = self.one(selector).rect
        event = {
            "x": place["x"] + 5,
            "y": place["y"] + 5,
            "data": {"items": [], "files": [str(path)], "dragOperationsMask": 1},
        }
        for kind in ("dragEnter", "dragOver", "drop"):
            self._driver.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, **event})

    def complaints(self) -> list[str]:
        """What the console has said since the last call, except that a request was refused."""
        said = self._driver.get_log("browser")
        return [entry["message"] for entry in said if entry["source"] != "network"]

    def hosts(self) -> set[str]:
        """Hosts that were asked for something since the last call."""
        events = [json.loads(e["message"])["message"] for e in self._driver.get_log("performance")]
        urls = [
            urlsplit(event["params"]["request"]["url"])
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return {url.netloc for url in urls if url.scheme != "data"}


@contextmanager
def browser() -> Iterator[Browser]:
    """Start Chromium without a window."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


if __name__ == "__main__":
    sys.exit(missing())
