"""The page as people use it: a real browser, the gateway of these tests, no other part."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import (
    JavascriptException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver import ActionChains, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

HOSTILE = "<img src=x onerror=\"document.title='broken in'\"><script>alert(1)</script>"
WAIT_S = 10


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    """One headless browser; its console is kept."""
    browser, service = shutil.which("chromium"), shutil.which("chromedriver")
    assert browser, "no chromium found; install it, e.g. apt-get install chromium"
    assert service, "no chromedriver found; install it, e.g. apt-get install chromium-driver"
    options = ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--window-size=1280,1060", "--force-prefers-reduced-motion"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, ChromeService(service))
    yield driver
    driver.quit()


@dataclass
class Page:
    """The open page and its gateway."""

    driver: webdriver.Chrome
    url: str
    key: str
    tmp_path: Path

    def __getitem__(self, element_id: str) -> WebElement:
        return self.driver.find_element(By.ID, element_id)

    def wait(self, condition: Callable[[], Any]) -> Any:
        ignored = (NoSuchElementException, StaleElementReferenceException)
        return WebDriverWait(self.driver, WAIT_S, 0.05, ignored).until(lambda _: condition())

    def connect(self, key: str | None = None) -> None:
        self["key"].send_keys(self.key if key is None else key, Keys.ENTER)
        if key is None:
            self.wait(lambda: self["models"].is_displayed())

    def go(self, section: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, f"nav a[href='#{section}']").click()
        self.wait(lambda: self[section].is_displayed())

    def send(self, text: str) -> None:
        self["prompt"].clear()
        self["prompt"].send_keys(text, Keys.ENTER)

    def be_greedy(self) -> None:
        """The engine then repeats what it was told, and never happens on its last token."""
        self["temperature"].send_keys(Keys.HOME)

    def wait_for_end(self) -> None:
        self.wait(lambda: self["send"].is_displayed())

    def console(self) -> list[str]:
        """Errors and violations, but for HTTP statuses that a test provokes."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["source"] != "network"]

    def picture(self, name: str) -> None:
        self.driver.save_screenshot(str(self.tmp_path / f"{name}.png"))


@pytest.fixture
async def page(
    gateway: Any, server_url: str, chromium: webdriver.Chrome, tmp_path: Path
) -> AsyncIterator[Page]:
    key = gateway.headers("infer")["authorization"].removeprefix("Bearer ")
    page = Page(chromium, server_url, key, tmp_path)
    await asyncio.to_thread(chromium.get, server_url)
    yield page
    assert await asyncio.to_thread(page.console) == []
    # Lets go of the server's connections.
    await asyncio.to_thread(chromium.get, "about:blank")


async def test_a_key_opens_the_page_and_is_kept_nowhere(page: Page) -> None:
    def visit() -> None:
        assert "heliostat keys create --tenant" in page["sign-in"].text
        page.connect("hst_wrong")
        page.wait(lambda: page["key-problem"].is_displayed())
        assert not page["models"].is_displayed()
        page["key"].clear()
        page.connect()
        text = page["catalogue"].text
        assert "classes/2" in text
        assert "@champion" in text
        assert "100 %" in text
        assert "not what was signed" in text
        page.driver.find_element(By.CSS_SELECTOR, "[data-of='talker/1'] summary").click()
        card = page.driver.find_element(By.CSS_SELECTOR, "[data-of='talker/1'] .card")
        assert "FakeForCausalLM" in card.text
        assert "heliostat models verify talker/1" in card.text
        page.picture("models")
        script = """
            return JSON.stringify({...localStorage}) + JSON.stringify({...sessionStorage})
                + document.cookie + (await indexedDB.databases()).length
                + document.documentElement.outerHTML + location.href
                + [...document.querySelectorAll("input")].map((field) => field.value)"""
        kept = page.driver.execute_script(script)
        assert kept.startswith("{}{}0<html")
        assert page.key not in kept
        page.driver.refresh()
        assert page["key"].is_displayed()
        assert not page["models"].is_displayed()
        page.connect()
        page["forget-key"].click()
        page.wait(lambda: page["key"].is_displayed())
        assert "classes" not in page.driver.page_source

    await asyncio.to_thread(visit)


async def test_a_key_that_was_revoked_ends_the_visit(page: Page, gateway: Any) -> None:
    def visit() -> None:
        page.connect()
        page.go("usage")
        (record,) = gateway.keys.list()
        gateway.keys.revoke(record.id)
        time.sleep(1)
        page.driver.find_element(By.CSS_SELECTOR, "nav a[href='#models']").click()
        page.wait(lambda: page["key-problem"].is_displayed())
        assert not page["models"].is_displayed()
        assert "classes" not in page.driver.page_source

    await asyncio.to_thread(visit)


async def test_text_streams_is_measured_and_stays_text(page: Page) -> None:
    def visit() -> None:
        page.connect()
        page.go("playground")
        Select(page["text-model"]).select_by_value("talker")
        page.be_greedy()
        page.send(HOSTILE)
        page.wait_for_end()
        answer = page.driver.find_element(By.CSS_SELECTOR, ".turn.model")
        assert HOSTILE in answer.text
        assert answer.find_elements(By.CSS_SELECTOR, "*") == []
        assert page.driver.title == "Playground · Heliostat"
        assert page["answered-by"].text == "talker/1, stop"
        assert page["first-token"].text.endswith(" ms")
        assert float(page["speed"].text) > 0
        prompt_tokens, completion_tokens = map(int, page["tokens"].text.split(" → "))
        assert prompt_tokens == completion_tokens + 1  # the template's last token
        page.picture("playground")
        page.send("again")
        page.wait_for_end()
        assert len(page.driver.find_elements(By.CSS_SELECTOR, ".turn")) == 4
        # What is cleared away while it is answered is no part of the next conversation.
        page["prompt"].send_keys("forgotten")
        page.driver.execute_script(
            "arguments[0].requestSubmit(); arguments[1].click()",
            page["playground-form"],
            page["clear"],
        )
        page.wait_for_end()
        page["prompt"].send_keys("anew")
        page["text-snippets"].find_element(By.TAG_NAME, "button").click()
        code = page["text-snippets"].find_element(By.TAG_NAME, "pre").text
        assert "anew" in code
        assert "again" not in code
        assert "forgotten" not in code

    await asyncio.to_thread(visit)


async def test_stop_ends_the_answer_and_the_work(page: Page) -> None:
    def visit() -> None:
        page.connect()
        page.go("playground")
        Select(page["text-model"]).select_by_value("mute")
        modes = page.driver.find_elements(By.NAME, "mode")
        assert [mode.is_enabled() for mode in modes] == [False, True]
        assert modes[1].is_selected()
        page.be_greedy()
        # Its gateway lets three be open: the fourth would be refused if the first still were.
        for _ in range(4):
            page.send("slowly")
            page.wait(lambda: page["tokens"].text not in ("–", "≈ 0"))
            page["stop"].click()
            page.wait_for_end()
            assert page["answered-by"].text == "mute/1, stopped"

    await asyncio.to_thread(visit)


async def test_an_error_is_shown_and_the_words_are_kept(page: Page) -> None:
    def visit() -> None:
        page.connect()
        page.go("playground")
        Select(page["text-model"]).select_by_value("talker")
        page["max-tokens"].clear()
        page["max-tokens"].send_keys("4000")
        page.send("too long")
        page.wait(lambda: page["playground-problem"].is_displayed())
        assert "256" in page["playground-problem"].text
        assert page["prompt"].get_attribute("value") == "too long"
        assert page["answered-by"].text == "failed"

    await asyncio.to_thread(visit)


async def test_copied_code_runs_and_holds_no_key(page: Page) -> None:
    words = 'it\'s "$HOME" `id` \\n 定日镜 </script>'

    def copy(section: str, name: str) -> str:
        page.driver.find_element(
            By.XPATH, f"//*[@id='{section}']//button[.='Copy as {name}']"
        ).click()
        shown = page.driver.find_element(By.CSS_SELECTOR, f"#{section} pre")
        code = shown.get_property("textContent")
        assert isinstance(code, str)
        assert page.key not in code
        assert "OPENAI_API_KEY" in code
        return code

    def run(*command: str) -> str:
        # No proxy between here and the gateway.
        environment = {"PATH": os.environ["PATH"], "OPENAI_API_KEY": page.key, "HOME": "/nowhere"}
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def visit() -> None:
        page.connect()
        page.go("playground")
        Select(page["text-model"]).select_by_value("talker")
        page.be_greedy()
        page["prompt"].send_keys(words)
        pieces = []
        for line in run("bash", "-c", copy("playground", "curl")).splitlines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content", ""))
        assert "".join(pieces) == words
        assert run(sys.executable, "-c", copy("playground", "Python")) == words
        page.go("draw")
        answer = json.loads(run("bash", "-c", copy("draw", "curl")))
        assert answer["outputs"][0]["shape"] == [1, 3]
        assert "'model_name': 'classes'" in run(sys.executable, "-c", copy("draw", "Python"))

    await asyncio.to_thread(visit)


async def test_a_drawing_is_scaled_down_and_its_classes_are_bars(page: Page) -> None:
    def bars() -> list[float]:
        shares = page.driver.find_elements(By.CSS_SELECTOR, "#bars .value")
        return [float(share.text.removesuffix(" %")) / 100 for share in shares]

    def pixels() -> list[int]:
        script = """
            const { width, height } = arguments[0];
            const { data } = arguments[0].getContext("2d").getImageData(0, 0, width, height);
            return [width, height, ...data.filter((_, index) => index % 4 === 0)]"""
        width, height, *values = page.driver.execute_script(script, page["seen"])
        assert (width, height) == (2, 2)
        return list(values)

    def expected(values: list[int]) -> list[float]:
        mean = sum(values) / 4 / 255
        scores = [math.exp(-20 * (mean - centre) ** 2) for centre in (0, 0.5, 1)]
        return [score / sum(scores) for score in scores]

    def visit() -> None:
        page.connect()
        page.go("draw")
        assert page["guess"].text == "Draw something"
        assert pixels() == [0, 0, 0, 0]
        page["fit"].click()
        # A line down the left side, by mouse.
        ActionChains(page.driver).move_to_element_with_offset(
            page["pad"], -70, -100
        ).click_and_hold().move_by_offset(0, 100).move_by_offset(0, 100).release().perform()
        page.wait(lambda: page["guess"].text != "Draw something")
        left, right, below_left, below_right = pixels()
        assert min(left, below_left) > 30
        assert right == below_right == 0
        assert bars() == pytest.approx(expected(pixels()), abs=6e-4)
        assert "classes/2" in page["guess-note"].text
        page.picture("draw")
        # Fitted, it lies in the middle.
        page["fit"].click()
        page.wait(lambda: bars() == pytest.approx(expected(pixels()), abs=6e-4))
        left, right, *_ = pixels()
        assert left == pytest.approx(right, abs=2)
        # The same by keyboard: clear, pen down, four steps to the right, pen up.
        page["pad"].send_keys(Keys.ESCAPE)
        assert page["guess"].text == "Draw something"
        page["pad"].send_keys(Keys.SPACE, *[Keys.ARROW_RIGHT] * 4, Keys.SPACE)
        page.wait(lambda: page["guess"].text != "Draw something")
        assert sum(pixels()) > 0

    await asyncio.to_thread(visit)


async def test_the_policy_forbids_what_the_page_never_does(page: Page) -> None:
    def attempt(script: str) -> Any:
        return page.driver.execute_script(script)

    def visit() -> None:
        with pytest.raises(JavascriptException, match="TrustedHTML"):
            attempt("document.body.innerHTML = '<p>text</p>'")
        attempt("""
            window.violated = [];
            addEventListener("securitypolicyviolation", (e) => violated.push(e.effectiveDirective));
            document.body.append(Object.assign(document.createElement("img"), {src: "http://127.0.0.1:9/x"}));
            document.body.setAttribute("style", "color: red");
            fetch("http://127.0.0.1:9/").catch(() => {});""")
        wanted = {"img-src", "style-src-attr", "connect-src"}
        page.wait(lambda: wanted <= set(attempt("return violated")))
        assert page.console() != []  # so the other tests would see a violation

    await asyncio.to_thread(visit)


async def test_the_page_fits_a_narrow_screen_and_names_every_control(page: Page) -> None:
    def visit() -> None:
        page.driver.set_window_size(500, 800)
        resize = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", resize)
        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        try:
            page.connect()
            for section in ("models", "playground", "draw", "usage"):
                page.go(section)
                for button in page[section].find_elements(By.CSS_SELECTOR, ".snippets button"):
                    button.click()
                page.driver.execute_script("scrollTo(0, 0)")
                page.picture(f"narrow-{section}")
                width = page.driver.execute_script("return document.documentElement.scrollWidth")
                assert width <= 400, section
                for control in page[section].find_elements(
                    By.CSS_SELECTOR, "button, input, select, textarea, canvas"
                ):
                    if control.is_displayed():
                        assert control.accessible_name, control.get_attribute("outerHTML")
            colour = page.driver.find_element(By.TAG_NAME, "body").value_of_css_property("color")
            assert "239, 236, 229" in colour
        finally:
            page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
            page.driver.set_window_size(1280, 1060)

    await asyncio.to_thread(visit)


async def test_usage_is_a_table_or_said_to_be_missing(page: Page, gateway: Any) -> None:
    answers: list[Any] = [
        JSONResponse({"error": {"message": "there is no such path"}}, 404),
        JSONResponse({"tenant": "acme", "since": "2026-01-01T00:00:00+00:00", "data": [
            {"kind": "completion", "model": "<b>talker</b>", "requests": 12345, "gpu_s": 0.0},
            {"kind": "inference", "model": "classes", "requests": 7, "gpu_s": 0.0},
        ]}),
        JSONResponse({"tenant": "acme", "data": []}),
    ]  # fmt: skip

    async def usage(_request: Request) -> Response:
        return answers.pop(0)

    # In front of the gateway's own, whatever that one says.
    gateway.app.router.routes.insert(0, Route("/v1/usage", usage))

    def visit() -> None:
        table = page["usage-table"]
        page.connect()
        page.go("usage")
        page.wait(lambda: "offers no usage" in table.text)
        page["refresh-usage"].click()
        page.wait(lambda: "talker" in table.text)
        rows = [row.text for row in table.find_elements(By.TAG_NAME, "tr")]
        assert rows[0].lower() == "kind model requests"
        assert rows[1] == "completion <b>talker</b> 12,345"
        assert "Tenant acme, since" in table.find_element(By.TAG_NAME, "caption").text
        page.picture("usage")
        page["refresh-usage"].click()
        page.wait(lambda: table.text == "Nothing was used yet.")

    await asyncio.to_thread(visit)
