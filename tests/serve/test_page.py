"""The page in a browser: keyboard, files, streaming, errors, a narrow screen. Needs selenium and Chromium."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from http_server import listening_server

pytestmark = pytest.mark.clients

WAIT = 60.0
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
)  # fmt: skip


@pytest.fixture(scope="module")
def address(make_client: Callable[..., TestClient]) -> Iterator[str]:
    """The address of a server."""
    with listening_server(make_client().app) as where:
        yield f"{where}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


def until(condition: Callable[[], Any]) -> Any:
    """Wait for a true value, and return it."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("the condition did not become true in time")


def by_id(browser: Any, name: str) -> Any:
    return browser.find_element("id", name)


def send(browser: Any, words: str) -> list[str]:
    """Type a message and press Enter. Returns the lines of facts when the answer is complete."""
    before = len(browser.find_elements("css selector", ".facts"))
    by_id(browser, "text").send_keys(words + "\ue007")
    until(lambda: len(browser.find_elements("css selector", ".facts")) > before)
    return [line.text for line in browser.find_elements("css selector", ".facts")[before:]]


def test_a_conversation_by_keyboard(browser: Any, address: str, tmp_path: Path) -> None:
    browser.get(address)
    until(lambda: "tiny" in by_id(browser, "model").text)
    assert browser.switch_to.active_element.get_attribute("id") == "text"
    assert by_id(browser, "send").is_displayed() and not by_id(browser, "stop").is_displayed()
    browser.execute_script("document.getElementById('tokens').value = 8")
    assert "+ 8 tokens" in send(browser, "Hello")[0]
    Image.new("RGB", (60, 40), (200, 0, 0)).save(tmp_path / "red.png")
    by_id(browser, "files").send_keys(str(tmp_path / "red.png"))
    until(lambda: "red.png" in by_id(browser, "attached").text)
    assert "+ 8 tokens" in send(browser, "What is it?")[0]
    assert browser.find_elements("css selector", "article.user img[alt='red.png']")
    assert len(browser.find_elements("css selector", "article")) == 4


def test_an_error_is_shown_and_the_next_message_works(browser: Any, address: str, tmp_path: Path) -> None:
    browser.get(address)
    until(lambda: "tiny" in by_id(browser, "model").text)
    browser.execute_script("document.getElementById('tokens').value = 4")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    by_id(browser, "files").send_keys(str(tmp_path / "broken.png"))
    send(browser, "And this?")
    assert "image" in browser.find_element("css selector", ".facts.error").text
    assert "+ 4 tokens" in send(browser, "Hello again")[0]


def test_a_recording(browser: Any, address: str) -> None:
    browser.get(address)
    by_id(browser, "record").click()
    until(lambda: by_id(browser, "record").text == "Stop recording")
    by_id(browser, "record").click()
    until(lambda: "recording." in by_id(browser, "attached").text)
    browser.find_element("css selector", "#attached button").click()
    assert by_id(browser, "attached").text == ""


def test_a_narrow_screen_and_no_other_hosts(browser: Any, address: str) -> None:
    browser.set_window_size(390, 800)
    browser.get(address)
    until(lambda: "tiny" in by_id(browser, "model").text)
    width = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1], "nothing is wider than the screen"
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    requests = [entry["message"] for entry in browser.get_log("performance") if "requestWillBeSent" in entry["message"]]
    assert requests and not [m for m in requests if '"url":"http' in m and f'"url":"{address}' not in m]
    assert [entry for entry in severe if "400" not in entry["message"]] == []
