"""The page in headless Chromium, with real bundles."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
import requests
from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.ui import WebDriverWait

import ditf
from tests.runtime.serving.tiny import serving

DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(DRIVER is None, reason="no chromedriver: apt-get install chromium-driver")


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """A person's actions on the page, and what the page shows."""

    def __init__(self, driver, url):
        self.driver, self.url = driver, url
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.get(url)

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def wait(self, condition):
        return WebDriverWait(self.driver, 20, 0.05).until(lambda _: condition())

    def loaded(self):
        self.wait(lambda: self.width("source") and self.width("target"))
        return self

    def width(self, side):
        return self.driver.execute_script(
            "return document.querySelector(arguments[0]).naturalWidth", f"#{side} .picture img"
        )

    def click(self, across, down):
        """Click the first image at fractions of its size."""
        picture = self.find("#source .picture img")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
        x, y = (across - 0.5) * picture.size["width"], (down - 0.5) * picture.size["height"]
        ActionChains(self.driver).move_to_element_with_offset(picture, round(x), round(y)).click().perform()

    def rows(self, count):
        """The table, once `count` points have answers: [(point, match, cosine)]."""

        def answered():
            rows = [
                [cell.text for cell in row.find_elements(By.TAG_NAME, "td")][1:4]
                for row in self.driver.find_elements(By.CSS_SELECTOR, "#points tbody tr")
            ]
            done = all(row[2] and row[1] != "..." for row in rows)  # the score of before may still be there
            return rows if len(rows) == count and done else None

        return [(numbers(p), numbers(m), float(score)) for p, m, score in self.wait(answered)]

    def heat(self):
        return self.wait(lambda: self.find("#target .heat").is_displayed())


def numbers(text):
    return [float(part) for part in text.split(",")]


def sample(server_url, name):
    return requests.get(f"{server_url}/samples/{name}.jpg", timeout=20).content


@pytest.fixture
def page(browser, server):
    browser.get_log("browser")
    page = Page(browser, server.url).loaded()
    yield page
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert all(address.startswith((server.url, "blob:")) for address in fetched), fetched


def test_a_click_shows_the_match_of_the_api(page, server):
    page.click(0.6, 0.4)
    page.click(0.3, 0.55)
    rows = page.rows(2)
    page.heat()
    files = {"source": sample(server.url, "same-left"), "target": sample(server.url, "same-right")}
    data = {"points": [f"{x:g},{y:g}" for (x, y), _, _ in rows]}
    answer = requests.post(f"{server.url}/match", files=files, data=data, timeout=20).json()
    np.testing.assert_allclose([match for _, match, _ in rows], answer["matches"], atol=0.01)
    np.testing.assert_allclose([score for _, _, score in rows], answer["scores"], atol=1e-4)
    # The marks are where the answers are, to a pixel of the image.
    for side, places in (("source", answer["points"]), ("target", answer["matches"])):
        box = page.find(f"#{side} .picture img").rect
        marks = page.driver.find_elements(By.CSS_SELECTOR, f"#{side} .mark")
        for mark, (x, y) in zip(marks, places, strict=True):
            rect = mark.rect
            found = (
                (rect["x"] + rect["width"] / 2 - box["x"]) * 480 / box["width"] - 0.5,
                (rect["y"] + rect["height"] / 2 - box["y"]) * 480 / box["height"] - 0.5,
            )
            assert np.abs(np.subtract(found, (x, y))).max() < 1
    assert f"{max(answer['scores'][1:]):.3f}" == page.find("#scale-high").text
    page.find("#points tbody button[aria-label='Remove point 1']").click()
    assert page.rows(1) == rows[1:]
    page.find("#clear").click()
    assert not page.find("#points").is_displayed()
    assert not page.find("#target .heat").is_displayed()


def test_the_keyboard_is_enough(page):
    picture = page.find("#source .picture")
    picture.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ENTER)
    [(point, match, score)] = page.rows(1)
    assert point == [242, 244]  # the middle, and steps of a two-hundredth
    said = page.find("#said").text
    assert said == f"Point 1 at 242, 244 matches {match[0]:g}, {match[1]:g}, cosine {score:.4f}"
    page.find("#x").send_keys("100.5")
    page.find("#y").send_keys("20", Keys.ENTER)
    assert page.rows(2)[1][0] == [100.5, 20]
    page.find("#points tbody button[aria-label='Heat map of point 1']").send_keys(Keys.ENTER)
    page.wait(lambda: page.find("#scale-point").text == "1")


def test_everything_that_is_used_has_a_name(page):
    page.click(0.5, 0.5)
    page.rows(1)
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    used = [n for n in nodes if not n["ignored"] and n["role"]["value"] in ROLES]
    assert {n["role"]["value"] for n in used} >= {"button", "combobox", "slider", "image", "spinbutton"}
    assert [n["role"]["value"] for n in used if not n["name"]["value"]] == []


ROLES = ("button", "combobox", "slider", "image", "spinbutton", "textbox", "application", "link", "table")


def test_the_slider_changes_the_bundle(page, tiny):
    page.click(0.6, 0.4)
    [before] = page.rows(1)
    page.find("#bundle").send_keys(Keys.ARROW_RIGHT)
    page.wait(lambda: page.find("#served").text.startswith("tiny:"))
    [after] = page.rows(1)
    assert before[0] == after[0]
    with ditf.load(tiny) as model:
        files = (Image.open(io.BytesIO(sample(page.url, f"same-{side}"))) for side in ("left", "right"))
        expected = model.match(*map(model.features, files), [after[0]])
    np.testing.assert_allclose(after[1], expected.points[0], atol=0.01)
    assert after[1:] != before[1:]


def test_own_images(page, demo_bundle, tmp_path):
    """EXIF rotates the photograph, and points refer to the rotated image, as everywhere in ditf."""
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (3, 4, 3)), np.ones((20, 20, 1))).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    page.find("#source input[type=file]").send_keys(str(tmp_path / "turned.jpg"))
    page.find("#target input[type=file]").send_keys(str(tmp_path / "plain.png"))
    page.wait(lambda: (page.width("source"), page.width("target")) == (60, 80))
    assert Select(page.find("#sample")).first_selected_option.text == "own images"
    page.click(0.25, 0.7)
    [(point, match, _)] = page.rows(1)
    assert point == pytest.approx((15, 56), abs=1)
    with ditf.load(demo_bundle) as model:
        maps = [model.features(tmp_path / name) for name in ("turned.jpg", "plain.png")]
        np.testing.assert_allclose(match, model.match(*maps, [point]).points[0], atol=0.01)


def test_a_file_that_is_no_image(page, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    page.find("#source input[type=file]").send_keys(str(tmp_path / "notes.png"))
    page.wait(lambda: page.find("#problem").text == "notes.png is not an image this browser can show")
    assert page.width("source") == 480  # the sample is still there
    page.click(0.5, 0.5)
    page.rows(1)
    assert not page.find("#problem").is_displayed()


def test_an_image_the_server_refuses(browser, server, page, tmp_path):
    """Nothing of the former image stays."""
    page.click(0.6, 0.4)
    page.rows(1)
    page.heat()
    Image.new("RGB", (30, 20)).save(tmp_path / "a.gif")
    page.find("#target input[type=file]").send_keys(str(tmp_path / "a.gif"))
    page.wait(lambda: page.find("#problem").text.startswith("Second image: "))
    page.wait(lambda: page.find("#points tbody td:nth-child(3)").text == "failed")
    assert not page.find("#target .heat").is_displayed()
    assert not page.find("#scale").is_displayed()
    assert page.find("#said").text == ""
    page.find("#target input[type=file]").send_keys(str(save(tmp_path / "b.png", 30, 20)))
    page.rows(1)
    page.heat()
    assert not page.find("#problem").is_displayed()
    browser.get_log("browser")  # of the refusals


def save(path, width, height):
    Image.effect_noise((width, height), 50).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("shape", [(3000, 40), (40, 3000), (1, 1)])
def test_odd_images_stay_in_the_window(page, tmp_path, shape):
    for side in ("source", "target"):
        page.find(f"#{side} input[type=file]").send_keys(str(save(tmp_path / f"{side}.png", *shape)))
        page.wait(lambda side=side: page.width(side) == shape[0])
    page.click(0.5, 0.5)
    [(point, _, _)] = page.rows(1)
    assert np.abs(np.subtract(point, np.subtract(shape, 1) / 2)).max() <= max(shape) / 48
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.driver.execute_script(overflow) <= 0
    assert page.find("#target .picture").rect["height"] <= 0.76 * 1000


def test_points_come_and_go_while_answers_are_under_way(page):
    for across in (0.3, 0.4, 0.5):
        page.click(across, 0.5)
    Select(page.find("#method")).select_by_value("window")
    page.click(0.6, 0.5)
    page.find("#points tbody button[aria-label='Remove point 2']").click()
    rows = page.rows(3)
    assert [row[0][0] for row in rows] == pytest.approx([144, 240, 288], abs=2)
    page.wait(lambda: page.find("#target .picture").get_attribute("aria-busy") == "false")


def test_a_phone(page):
    screen = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page.click(0.5, 0.5)
    page.rows(1)
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 360
    first, second = (page.find(f"#{side} .picture").rect for side in ("source", "target"))
    assert second["y"] > first["y"] + first["height"]
    assert min(first["width"], second["width"]) > 300


def test_an_api_key(browser, demo_bundle):
    with serving(demo_bundle, api_key="opensesame") as running:
        page = Page(browser, running.url)
        page.wait(lambda: page.find("#key").is_displayed())
        asked = "This server asks for an API key: type it above"
        page.wait(lambda: page.find("#problem").text == asked and page.width("target"))
        page.find("#key").send_keys("wrong", Keys.TAB)
        page.wait(lambda: page.find("#problem").text == "That is not this server's API key")
        page.find("#key").clear()
        page.find("#key").send_keys("opensesame", Keys.TAB)
        page.loaded().wait(lambda: page.find("#served").text)
        page.click(0.5, 0.5)
        page.rows(1)
        assert not page.find("#problem").is_displayed()
