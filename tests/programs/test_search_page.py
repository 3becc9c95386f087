"""The page of examples/search.py in Chromium: what a visitor types, drops and switches, on a desk and a phone."""

import base64
import json
import os
import shutil
from pathlib import Path

import pytest

from conftest import ROOT

pytestmark = pytest.mark.heavy
pytest.importorskip("lancedb")
pytest.importorskip("gradio")
pytest.importorskip("selenium")
if not shutil.which("chromium") or not shutil.which("chromedriver"):
    pytest.skip("needs Debian's packages chromium and chromium-driver", allow_module_level=True)

from search_index import Embedder, Index, Searcher  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from tools.hub import search_screenshot  # noqa: E402

PICTURES = ROOT / "examples" / "pictures"
NOTE = """
window.answers = [];
new MutationObserver(() => {
    const text = document.querySelector('#found p[role]')?.innerText;
    if (text) window.answers.push(text);  // an answer may be noted twice
}).observe(document.body, {childList: true, subtree: true, characterData: true});
"""
# Notes the words of every question that the server has answered.
NOTE_SERVED = """
window.served = [];
const asked = window.fetch;
window.fetch = async (address, options) => {
    const response = await asked(address, options);
    if (String(address).includes('run/answer')) window.served.push(JSON.parse(options.body).data[0]);
    return response;
};
"""
# What a browser tells a page when a file is let go over it.
DROP = """
const [zone, name, content] = arguments;
const transfer = new DataTransfer();
transfer.items.add(new File([Uint8Array.from(atob(content), letter => letter.charCodeAt(0))], name));
for (const kind of ['dragenter', 'dragover', 'drop'])
    zone.dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
"""


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """The index of the example images and of one whose name and place are foreign text; its images."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(PICTURES, folder / "pictures")
    shutil.copy(PICTURES / "panda.png", folder / "pictures" / "<b onclick=x>&.png")
    search_screenshot.index(folder / "pictures", ["--index", folder / "index", "--model", trained])
    return folder


@pytest.fixture(scope="module")
def address(trained, folder):
    with search_screenshot.served(["--index", folder / "index", "--model", trained], folder / "log") as url:
        yield url


@pytest.fixture
def browse(address, tmp_path):
    """Open the page in a window of some size."""
    opened = []

    def open_page(width: int = 1280, height: int = 900) -> "Page":
        opened.append(search_screenshot.browser(tmp_path / str(len(opened)), width, height))
        return Page(opened[-1], address)

    yield open_page
    for driver in opened:
        driver.quit()


FILE = (By.CSS_SELECTOR, "#picture input[type=file]")


class Page:
    """What a visitor does."""

    def __init__(self, driver, address):
        self.driver, self.wait = driver, search_screenshot.wait
        self.words = search_screenshot.opened(driver, address)
        driver.execute_script(NOTE)

    def text(self, selector: str) -> str:
        return self.driver.find_element(By.CSS_SELECTOR, selector).text

    def answers(self) -> list[str]:
        return self.driver.execute_script("return window.answers")

    def ask(self, words: str) -> list[str]:
        """The names of the files that are found."""
        count = len(self.answers())
        self.words.clear()
        self.words.send_keys(words, Keys.ENTER)
        self.wait(lambda: any(f"“{words.strip()}”" in answer for answer in self.answers()[count:]))
        return self.names()

    def names(self) -> list[str]:
        return [each.text for each in self.driver.find_elements(By.CSS_SELECTOR, "#found small:last-child")]

    def upload(self, path: Path) -> str:
        """What the page says."""
        return self.said_of(path, lambda: self.driver.find_element(*FILE).send_keys(str(path)))

    def drop(self, path: Path) -> str:
        content = base64.b64encode(path.read_bytes()).decode()
        zone = self.driver.find_element(By.CSS_SELECTOR, "#picture button")
        return self.said_of(path, lambda: self.driver.execute_script(DROP, zone, path.name, content))

    def said_of(self, path: Path, give) -> str:
        self.wait(lambda: self.driver.find_element(*FILE))
        count = len(self.answers())
        give()
        self.wait(lambda: any(path.name in answer for answer in self.answers()[count:]))
        return self.answers()[-1]


def test_words_show_the_right_image_first(browse, folder, trained):
    page = browse()
    for words in ("panda", "熊猫", "パンダの顔"):
        assert page.ask(words)[0] in ("panda.png", "<b onclick=x>&.png"), words
        assert f"12 for “{words}”" in page.text("#found p")
    best = Searcher(Index(folder / "index"), Embedder(str(trained))).search(words="火箭", k=1)[0]
    assert page.ask("火箭")[0] == os.path.basename(best.path)
    assert page.text("#found b") == f"{best.cosine:.3f}" and best.caption in page.text("#found li")
    assert page.driver.execute_script("return document.querySelector('#found img').naturalWidth") > 100
    assert not page.driver.find_elements(By.CSS_SELECTOR, "#found figcaption b[onclick]"), "names are no HTML"
    page.ask("lion\u200b ")  # what is no image's name is answered too


def test_images_find_themselves_and_what_is_none_is_said(browse, tmp_path):
    page = browse()
    assert "for lion.png" in page.drop(PICTURES / "lion.png") and page.names()[0] == "lion.png"
    broken = tmp_path / "broken.png"
    broken.write_bytes((PICTURES / "lion.png").read_bytes()[:300])
    assert "damaged" in page.drop(broken)
    assert page.driver.find_element(By.CSS_SELECTOR, "#found [role=alert]").is_displayed() and not page.names()
    assert "for pizza.png" in page.upload(PICTURES / "pizza.png") and page.names()[0] == "pizza.png"
    count = len(page.answers())
    page.driver.find_element(By.CSS_SELECTOR, "#mode input[value=InternVL-G]").click()
    page.wait(lambda: len(page.answers()) > count)
    assert "for pizza.png" in page.answers()[-1] and page.names()[0] == "pizza.png", "the same is asked again"
    assert page.ask("panda")[0] in ("panda.png", "<b onclick=x>&.png")


def test_a_question_without_an_answer_does_not_stop_the_next(browse):
    page = browse()
    page.driver.set_network_conditions(offline=True, latency=0, throughput=-1)
    page.words.send_keys("fox", Keys.ENTER)
    page.wait(lambda: "No answer" in page.text("#found [role=alert]"))
    page.driver.set_network_conditions(offline=False, latency=0, throughput=-1)
    assert page.ask("panda")[0] in ("panda.png", "<b onclick=x>&.png")


def test_twenty_rapid_queries_all_answer(browse):
    page = browse()
    page.driver.execute_script(NOTE_SERVED)
    words = [entry["name"]["en"] for entry in json.loads((PICTURES / "examples.json").read_text("utf-8"))[:20]]
    for each in words:
        # In one piece: the page may write its own text into the field between two commands of the driver.
        page.words.send_keys(Keys.CONTROL + "a" + Keys.NULL + each + Keys.ENTER)
    page.wait(lambda: f"“{words[-1]}”" in page.text("#found p"))
    asked = [answer.split("“")[1].split("”")[0] for answer in page.answers()]
    assert page.driver.execute_script("return window.served") == words
    # A busy browser may draw two answers at once, and then the first is not seen.
    shown = list(dict.fromkeys(asked))
    assert shown == [each for each in words if each in shown] and shown[-1] == words[-1]
    assert not page.driver.find_elements(By.CSS_SELECTOR, "#found [role=alert]")


def test_switches_and_labels_by_the_keyboard_alone(browse):
    page = browse()
    page.ask("panda")
    reached = set()
    for _ in range(40):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        element = page.driver.switch_to.active_element
        for name in ("picture", "mode", "rerank", "labels", "k"):
            if not element.find_elements(By.XPATH, f"ancestor-or-self::*[@id='{name}']"):
                continue
            count, is_new = len(page.answers()), name not in reached
            reached.add(name)
            if name == "mode" and element.get_attribute("value") == "InternVL-G" and not element.is_selected():
                element.send_keys(Keys.SPACE)
                page.wait(lambda before=count: len(page.answers()) > before)
            if name == "rerank" and is_new:
                element.send_keys(Keys.SPACE)
                page.wait(lambda: "match" in page.text("#found"))
            if name == "labels" and is_new:
                element.send_keys("狮子, panda", Keys.ENTER)
                page.wait(lambda: "panda " in page.text("#found li:first-child"))
    assert reached == {"picture", "mode", "rerank", "labels", "k"}
    assert page.driver.find_element(By.CSS_SELECTOR, "#mode input[value=InternVL-G]").is_selected()
    assert page.names()[0] in ("panda.png", "<b onclick=x>&.png")


@pytest.mark.parametrize("width", [320, 390])
def test_it_fits_a_phone(browse, width):
    page = browse(width, 740)
    page.ask("panda")
    wide = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1] == width
    boxes = [each.rect for each in page.driver.find_elements(By.CSS_SELECTOR, "#words, #picture, #mode, #found li")]
    assert boxes and all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    size = page.driver.execute_script("return parseFloat(getComputedStyle(arguments[0]).fontSize)", page.words)
    assert size >= 14


def test_nothing_outside_this_machine_is_asked_for(browse, address):
    page = browse()
    page.ask("panda")
    messages = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(address) for url in asked)
    outside = [url for url in asked if not url.startswith((address, "data:", "blob:", "chrome:"))]
    assert not outside
