"""Take the screenshot of the page of examples/search.py for docs/search.md.

Run by whoever changes the page; tests/programs/test_search_page.py imports what drives the page in Chromium.

    python -m tools.hub.search_screenshot             # writes examples/search.png: a desk and a phone side by side

It needs selenium and Debian's packages chromium, chromium-driver and fonts-noto-cjk.
"""

import argparse
import io
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tools import ROOT, step

SCRIPT = ROOT / "examples" / "search.py"
FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "disable-dev-shm-usage", "hide-scrollbars",
)  # fmt: skip
# Width, height and query of each screenshot.
DESK, PHONE = (1180, 860, "熊猫"), (390, 860, "キツネの顔")
PHONES = 500  # narrower ones are emulated phones: a window cannot be so narrow
LAST_RESORT = 1200  # seconds: a busy machine needs fewer, so the page hangs


def index(folder: Path, arguments: list) -> None:
    """Index `folder`; `arguments` name the index, and the model if it is not the default."""
    subprocess.run([sys.executable, SCRIPT, "index", folder, *arguments], check=True, capture_output=True)


@contextmanager
def served(arguments: list, log: Path) -> Iterator[str]:
    """Serve the page while the block runs; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, SCRIPT, "page", *arguments, "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            end = time.monotonic() + LAST_RESORT
            while True:
                try:
                    urllib.request.urlopen(url, timeout=LAST_RESORT).read()
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > end:
                        raise RuntimeError(f"The page did not come up: {log.read_text()[-3000:]}") from None
                    time.sleep(0.5)
            yield url
        finally:
            server.kill()


def browser(profile: Path, width: int, height: int) -> webdriver.Chrome:
    """A new Chromium of this size; `profile` is a new folder."""
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"window-size={width},{height}", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium")
    if width < PHONES:
        metrics = {"width": width, "height": height, "pixelRatio": 2, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "SEVERE"})
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def wait(condition: Callable):
    ignored = (WebDriverException,)  # elements that are drawn anew meanwhile
    return WebDriverWait(None, LAST_RESORT, poll_frequency=0.1, ignored_exceptions=ignored).until(lambda _: condition())


def opened(driver: webdriver.Chrome, url: str) -> WebElement:
    """Wait until the page is ready and its field for words has the cursor; gives that field."""
    driver.get(url)
    box = wait(lambda: driver.find_element(By.CSS_SELECTOR, "#words textarea, #words input"))
    for part in ("#options button", "#found [data-do=try]"):
        wait(lambda part=part: driver.find_element(By.CSS_SELECTOR, part))
    wait(lambda: driver.execute_script("return document.activeElement.closest('#words') !== null"))
    return box


def screenshot(url: str, profile: Path, width: int, height: int, words: str) -> Image.Image:
    driver = browser(profile, width, height)
    try:
        box = opened(driver, url)
        if width >= PHONES:  # the bars of a window reduce its height
            driver.set_window_size(width, 2 * height - driver.execute_script("return window.innerHeight"))
        box.send_keys(words, Keys.ENTER)
        wait(lambda: driver.find_elements(By.CSS_SELECTOR, "#found [role=status]"))
        wait(lambda: driver.execute_script("return [...document.images].every(each => each.complete)"))
        driver.execute_script("document.activeElement.blur()")  # no cursor, which blinks
        time.sleep(1)  # for whatever fades in
        shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
        return shot.resize((round(shot.width * height / shot.height), height), Image.Resampling.LANCZOS)
    finally:
        driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "search.png", help="the file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        where = ["--index", folder / "index"]
        with step("indexing the example images"):
            index(ROOT / "examples" / "pictures", where)
        with step("starting the page and taking the screenshots"), served(where, folder / "log") as url:
            shots = [screenshot(url, folder / str(shot[0]), *shot) for shot in (DESK, PHONE)]
    gap = 20
    sheet = Image.new("RGB", (sum(shot.width for shot in shots) + gap, shots[0].height), "white")
    sheet.paste(shots[0], (0, 0))
    sheet.paste(shots[1], (shots[0].width + gap, 0))
    sheet.quantize(256, dither=Image.Dither.NONE).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
