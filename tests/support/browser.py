"""Headless Chromium. Run as a script, it takes the README's picture of the page:

PYTHONPATH=tests .venv/bin/python -m support.browser docs/images/playground.png
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from support.server import serve

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_S = 20


class Page:
    """The playground in a browser."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def find(self, selector: str):
        """The first element; waits for it."""
        return self.wait(lambda: next(iter(self.driver.find_elements(By.CSS_SELECTOR, selector)), None))

    def text(self, selector: str) -> str:
        """All text of the last element, folded text included; "" without one."""
        found = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return found[-1].get_property("textContent") if found else ""

    def write(self, selector: str, text: str) -> None:
        """Put `text` into a field as typing does, then leave the field."""
        field = self.find(selector)
        field.clear()
        field.send_keys(text)
        self.driver.execute_script("arguments[0].dispatchEvent(new Event('change'))", field)

    def wait(self, condition):
        """The first true value of `condition`."""
        return WebDriverWait(self.driver, PATIENCE_S, poll_frequency=0.05).until(lambda _: condition())

    def errors(self) -> list[str]:
        """What the console complained about, broken rules of the policy included, since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def open_page(url: str, width: int = 1280, height: int = 860) -> Iterator[Page]:
    """A fresh browser at `url`."""
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(argument)
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        try:
            driver.get(url)
            yield Page(driver)
        finally:
            driver.quit()


def main(path: str) -> None:
    """Chat with the embedded model and save what the page looks like."""
    with serve("--num-draft-tokens", "2") as server, open_page(server.url, height=1480) as page:
        page.write("#max_tokens", "120")
        page.write("#temperature", "0")
        for text in ("Hello! Who are you?", "What is the capital of Norway?"):
            page.write("#prompt", text)
            page.find("#thinking").click()  # off, then on
            page.find("#send").click()
            page.wait(lambda: page.find("#stop").is_enabled())
            page.wait(lambda: page.find("#send").is_enabled())
            time.sleep(2)  # two more points of the sparklines
        page.driver.save_screenshot(path)


if __name__ == "__main__":
    main(sys.argv[1])
