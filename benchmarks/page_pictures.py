"""docs/page.png and docs/page-phone.png: the page of `ditf serve BUNDLE` in headless Chromium.

Give the demo's bundle: python benchmarks/page_pictures.py bundles/demo-l9-fp16
"""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from pathlib import Path

from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

DOCS = Path(__file__).parent.parent / "docs"
POINTS = [(0.81, 0.2), (0.6, 0.36), (0.3, 0.58), (0.09, 0.63), (0.58, 0.78)]
"""Eye, neck, belly, tail and a hoof of the sample's first image, as fractions of it."""
DRIVER = "/usr/bin/chromedriver"  # Debian's chromium-driver


def main() -> None:
    """Serve the bundle, and take the pictures."""
    command = [sys.executable, "-m", "ditf", "serve", sys.argv[1], "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = re.search(r"http://\S+", server.stdout.readline())
            assert url is not None
            options = webdriver.ChromeOptions()
            for argument in ("--headless=new", "--no-sandbox", "--window-size=1200,1000"):
                options.add_argument(argument)
            with webdriver.Chrome(options=options, service=Service(DRIVER)) as driver:
                take_pictures(driver, url[0])
        finally:
            server.terminate()


def take_pictures(driver: webdriver.Chrome, url: str) -> None:
    """Click the points, and save the page as a desktop and as a phone shows it."""
    driver.get(url)
    wait = WebDriverWait(driver, 30)
    for side in ("source", "target"):
        loaded = f"return document.querySelector('#{side} .picture img').naturalWidth"
        wait.until(lambda driver, loaded=loaded: driver.execute_script(loaded))
    picture = driver.find_element(By.CSS_SELECTOR, "#source .picture img")
    for count, (across, down) in enumerate(POINTS, start=1):
        offset = [round((f - 0.5) * picture.size[k]) for f, k in ((across, "width"), (down, "height"))]
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
        ActionChains(driver).move_to_element_with_offset(picture, *offset).click().perform()
        cosine = f"#points tbody tr:nth-child({count}) td:nth-child(4)"
        wait.until(lambda driver, cosine=cosine: driver.find_element(By.CSS_SELECTOR, cosine).text)
    driver.find_element(By.CSS_SELECTOR, "#points tbody tr:nth-child(2) button").click()
    wait.until(lambda driver: driver.find_element(By.ID, "scale-point").text == "2")
    driver.execute_script("document.activeElement.blur()")
    for name, width, height, scale in (("page", 1100, 800, 1), ("page-phone", 390, 1760, 1)):
        screen = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        (DOCS / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    main()
