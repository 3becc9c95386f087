"""The page of examples/search.py in Chromium: what a visitor types, drops and switches, on a desk and a phone."""

import base64
import json
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

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


# The contrast of each text that a selector finds with what is behind it, as WCAG 2 defines it.
CONTRAST = """
const channels = color => color.match(/[\\d.]+/g).map(Number);
const light = color => {
    const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = channels(color).map(c => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
};
const behind = element => {
    const color = getComputedStyle(element).backgroundColor;
    return (channels(color)[3] ?? 1) ? color : behind(element.parentElement);
};
return [...document.querySelectorAll(arguments[0])].map(element => {
    const both = [light(getComputedStyle(element).color), light(behind(element))];
    return [Math.max(...both) / Math.min(...both), element.outerHTML.slice(0, 80)];
});
"""
# Whether each letter of the page's field for words is drawn as itself, not as the box of a missing letter.
DRAWN = """
const canvas = Object.assign(document.createElement('canvas'), {width: 40, height: 40});
const draw = letter => {
    const pen = canvas.getContext('2d');
    pen.clearRect(0, 0, 40, 40);
    pen.font = `24px ${getComputedStyle(arguments[0]).fontFamily}`;
    pen.fillText(letter, 4, 30);
    return canvas.toDataURL();
};
const missing = [draw(' '), draw('\\u{10FFFD}')];
return [...arguments[1]].map(letter => !missing.includes(draw(letter)));
"""
ODD = "<b onclick=x>&.png"


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """The index of the example images and of a large one whose name and place are foreign text; its images."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(PICTURES, folder / "pictures")
    Image.open(PICTURES / "panda.png").resize((900, 900)).save(folder / "pictures" / ODD)
    options = ["--index", folder / "index", "--model", trained, "--captions"]
    search_screenshot.index(folder / "pictures", options)
    return folder


@pytest.fixture(scope="module")
def address(trained, folder):
    with search_screenshot.served(["--index", folder / "index", "--model", trained], folder / "log") as url:
        yield url


@pytest.fixture
def browse(address, tmp_path):
    """Open the page in a window of some size."""
    opened = []

    def open_page(width: int = 1280, height: int = 900, scheme: str = "light") -> "Page":
        opened.append(search_screenshot.browser(tmp_path / str(len(opened)), width, height))
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened[-1].execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        return Page(opened[-1], address)

    yield open_page
    for driver in opened:
        driver.quit()


FILE = (By.CSS_SELECTOR, "#ask input[type=file]")


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
        zone = self.driver.find_element(By.TAG_NAME, "h1")  # anywhere on the page
        return self.said_of(path, lambda: self.driver.execute_script(DROP, zone, path.name, content))

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def open_options(self) -> None:
        self.all("#options button")[0].send_keys(Keys.ENTER)
        self.wait(lambda: self.text("#labels"))

    def open_first(self) -> None:
        """Open the first image large, with the keyboard."""
        self.all("#found li button")[0].send_keys(Keys.ENTER)
        self.wait(lambda: self.all("dialog[open]"))

    def said_of(self, path: Path, give) -> str:
        self.wait(lambda: self.driver.find_element(*FILE))
        count = len(self.answers())
        give()
        self.wait(lambda: any(path.name in answer for answer in self.answers()[count:]))
        return self.answers()[-1]


def test_words_show_the_right_image_first(browse, folder, trained):
    page = browse()
    for words in ("panda", "熊猫", "パンダの顔"):
        assert page.ask(words)[0] in ("panda.png", ODD), words
        assert f"The 12 images closest to “{words}”" in page.text("#found p")
    best = Searcher(Index(folder / "index"), Embedder(str(trained))).search(words="火箭", k=1)[0]
    assert page.ask("火箭")[0] == os.path.basename(best.path)
    assert page.text("#found b") == f"{best.cosine:.3f}" and best.caption in page.text("#found li")
    assert page.driver.execute_script("return document.querySelector('#found img').naturalWidth") > 100
    assert not page.driver.find_elements(By.CSS_SELECTOR, "#found figcaption b[onclick]"), "names are no HTML"
    page.ask("lion\u200b ")  # what is no image's name is answered too


def test_images_find_themselves_and_what_is_none_is_said(browse, tmp_path):
    page = browse()
    assert "closest to lion.png" in page.drop(PICTURES / "lion.png") and page.names()[0] == "lion.png"
    broken = tmp_path / "broken.png"
    broken.write_bytes((PICTURES / "lion.png").read_bytes()[:300])
    assert "damaged" in page.drop(broken)
    assert page.driver.find_element(By.CSS_SELECTOR, "#found [role=alert]").is_displayed() and not page.names()
    assert "closest to pizza.png" in page.upload(PICTURES / "pizza.png") and page.names()[0] == "pizza.png"
    count = len(page.answers())
    page.open_options()
    page.driver.find_element(By.CSS_SELECTOR, "#mode input[value=InternVL-G]").click()
    page.wait(lambda: len(page.answers()) > count)
    assert "closest to pizza.png" in page.answers()[-1] and page.names()[0] == "pizza.png", "the same is asked again"
    assert page.ask("panda")[0] in ("panda.png", ODD)


def test_a_question_without_an_answer_does_not_stop_the_next(browse):
    page = browse()
    page.driver.set_network_conditions(offline=True, latency=0, throughput=-1)
    page.words.send_keys("fox", Keys.ENTER)
    page.wait(lambda: "No answer" in page.text("#found [role=alert]"))
    page.driver.set_network_conditions(offline=False, latency=0, throughput=-1)
    assert page.ask("panda")[0] in ("panda.png", ODD)


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
        if element.text.startswith("Options") and "mode" not in reached:
            element.send_keys(Keys.ENTER)
            page.wait(lambda: page.text("#mode"))
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
    assert page.names()[0] in ("panda.png", ODD)


@pytest.mark.parametrize("width", [320, 390])
def test_it_fits_a_phone(browse, width):
    page = browse(width, 740)
    page.ask("panda")
    wide = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1] == width
    boxes = [each.rect for each in page.all("#words, #picture, #options, #note, #found li")]
    assert boxes and all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    size = page.driver.execute_script("return parseFloat(getComputedStyle(arguments[0]).fontSize)", page.words)
    assert size >= 14
    top = "return [scrollY, document.querySelector('#found li').getBoundingClientRect().top / innerHeight]"
    scrolled, share = page.driver.execute_script(top)
    assert scrolled == 0 and share < 0.5, "results begin in the first half of the screen, even below the note"
    page.open_first()
    boxes = [each.rect for each in page.all("dialog, dialog img, dialog input, dialog button")]
    assert len(boxes) == 6 and all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)


def test_before_the_first_query(browse):
    """What the page is for, what it holds, what to try, and that tiny/ knows no photographs."""
    page = browse()
    assert page.text("h1") == "Search your images" and "what they show" in page.text("#top p")
    assert page.text("#note").startswith(
        "For photographs, index again with the 14B"
    ) and "only knows emoji" in page.text("#note")
    assert [each.text for each in page.all("#note code")] == ["--model ORG/InternVL-14B", "--index NEW_FOLDER"]
    assert len(set(page.names())) == 12 and not page.all("footer")
    tries = [each.text for each in page.all("#found [data-do=try]")]
    assert len(tries) == 3
    page.all("#found [data-do=try]")[1].click()
    page.wait(lambda: f"“{tries[1]}”" in page.text("#found p"))
    assert page.words.get_property("value") == tries[1] and page.names()[0] == "bicycle.png"
    page.words.send_keys(Keys.CONTROL + "a" + Keys.NULL + Keys.BACKSPACE + Keys.ENTER)
    page.wait(lambda: page.answers()[-1] == "⚠ Type what the image shows, or give an image.")
    assert len(page.all("#found [data-do=try]")) == 3, "and one can begin again"


def test_options_without_a_query_ask_nothing(browse):
    page = browse()
    page.open_options()
    page.driver.find_element(By.CSS_SELECTOR, "#mode input[value=InternVL-G]").click()
    page.ask("panda")
    assert all("“panda”" in answer for answer in page.answers())


def test_results_open_large_with_their_path_and_what_is_like_them(browse, folder):
    page = browse()
    names = page.ask("panda")
    place = names.index(ODD)
    page.all("#found li button")[place].click()
    page.wait(lambda: page.driver.execute_script("return document.querySelector('dialog img').naturalWidth") == 900)
    assert page.all("#found li img")[place].get_property("naturalWidth") == 320, "not the thumbnail"
    shown = page.text("dialog figcaption")
    assert shown.startswith("similarity 0.") and "“" in shown
    for each in page.all("dialog figcaption span[title]"):  # what hovering says is spelt out here, for those who cannot
        after = page.driver.execute_script("return getComputedStyle(arguments[0], '::after').content", each)
        assert "How close the image is to the query" in after
    path = str((folder / "pictures" / ODD).resolve())
    assert page.all("dialog input")[0].get_property("value") == path
    page.all("dialog [data-do=copy]")[0].click()
    page.wait(lambda: page.text("dialog [data-do=copy]") == "Copied")
    page.all("dialog [data-do=like]")[0].click()
    page.wait(lambda: f"closest to {ODD}" in page.text("#found [role=status]"))
    assert not page.all("dialog[open]") and page.names()[0] == "panda.png" and ODD not in page.names()
    page.words.send_keys(Keys.CONTROL + "v")
    assert page.words.get_property("value") == path, "it is in the clipboard"
    page.open_first()
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.wait(lambda: not page.all("dialog[open]"))


def test_only_indexed_images_are_given_away(address, folder):
    def large(path: Path) -> str:
        body = json.dumps({"data": [path.resolve().as_uri()]}).encode()
        request = urllib.request.Request(f"{address}/gradio_api/run/large", body, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))["data"][0]

    assert large(folder / "pictures" / "fox.png").startswith("data:image/webp;base64,")
    assert large(PICTURES / "fox.png") == "" and large(folder / "pictures" / "examples.json") == ""


def test_refusals_are_in_the_words_of_the_user(browse, tmp_path):
    page = browse()
    notes = tmp_path / "notes.txt"
    notes.write_text("milk")
    said = [page.upload(notes)]
    page.words.send_keys("panda " * 200, Keys.ENTER)
    page.wait(lambda: "characters" in page.answers()[-1])
    said.append(page.answers()[-1])
    page.ask("panda")
    page.open_options()
    page.all("#labels textarea")[0].send_keys("panda", Keys.ENTER)
    page.wait(lambda: page.all("#found [role=alert]"))
    assert [*said, page.answers()[-1]] == [
        "⚠ notes.txt: not an image in a known format",
        f"⚠ “{('panda ' * 200)[:40]}…” is too long for the model (1,199 characters). Shorten it to a sentence or two.",
        "⚠ Give two labels or more, none of them empty; got: panda.",
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_all_can_be_read_and_the_focus_be_seen(browse, width, scheme):
    page = browse(width, 860, scheme)
    dark = page.driver.execute_script("return document.body.classList.contains('dark')")
    assert dark is (scheme == "dark")
    page.open_options()
    texts = "h1, #top p, #note p, #note code, #ask button, #options span, #found [data-do=try], #found small"
    found = page.driver.execute_script(CONTRAST, texts)
    page.ask("panda")
    page.open_first()
    texts = "#found p, #found figcaption, #found figcaption *, dialog figcaption, dialog input, dialog button"
    found += page.driver.execute_script(CONTRAST, texts)
    assert len(found) > 60 and not [each for each in found if each[0] < 4.5]
    seen = set()
    for _ in range(25):
        element = page.driver.switch_to.active_element
        if element.tag_name != "body":  # between the last and the first
            ring = "const s = getComputedStyle(arguments[0]); return [s.outlineStyle, parseFloat(s.outlineWidth)]"
            assert page.driver.execute_script(ring, element) == ["solid", 3], element.get_attribute("outerHTML")[:200]
            seen.add((element.tag_name, element.get_attribute("type"), element.get_attribute("data-do")))
        if element.get_attribute("autofocus") and element.tag_name == "button":
            page.driver.execute_script("document.querySelector('dialog').close()")
            page.words.click()
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert {kind for _, kind, _ in seen} >= {"radio", "checkbox", "number", "range", "textarea", "submit"}
    assert ("button", "submit", "open") in seen


def test_chinese_and_japanese_are_drawn(browse):
    if not shutil.which("fc-list") or not subprocess.run(["fc-list", ":lang=ja"], capture_output=True).stdout:
        pytest.skip("needs fonts with Chinese and Japanese letters, such as Debian's package fonts-noto-cjk")
    page = browse()
    letters = sorted({letter for each in page.all("#found [data-do=try]")[1:] for letter in each.text} | set("狐すし"))
    drawn = page.driver.execute_script(DRAWN, page.words, "".join(letters))
    assert len(drawn) == len(letters) > 8 and all(drawn), dict(zip(letters, drawn))


def test_nothing_outside_this_machine_is_asked_for(browse, address):
    page = browse()
    page.ask("panda")
    messages = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(address) for url in asked)
    outside = [url for url in asked if not url.startswith((address, "data:", "blob:", "chrome:"))]
    assert not outside
