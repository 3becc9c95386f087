"""Makes the web page of search.py: `python examples/search.py page`.

Enter searches for words, dropping an image searches for that; any other change repeats the last query. Of the folders
the page can only read the indexed images. It loads nothing from outside this machine: no fonts, no analytics.
"""

import base64
import html
import os
import re
import time

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported

import gradio as gr
from decoding import DAMAGED
from search_index import Result, Searcher, SearchError, make_thumbnail, path_of, printable, read_bytes, uri_of

LARGE = 1600  # pixels of the longer side of an opened image
MODES = [("By sight (InternVL-C)", "InternVL-C"), ("By sight and language (InternVL-G)", "InternVL-G")]
TRIES = {"tiny": ("penguin", "自行车", "ロケット"), "14B": ("a dog", "红色的花", "海辺の夕日")}
SIMILARITY = "How close the image is to the query, at most 1 (a cosine). Compare it only within one search."
RANK = "Similarity and match in one number, which orders the images."
MATCH = "The probability that the words describe the image, from looking at both together."
LABEL = "The likeliest of your labels, and its probability."
CSS = """
.html-container { padding: 0 !important }
h1 { font-size: 1.6rem; font-weight: 700; margin: 0 }
#note { border-left: 6px solid #d97706 !important; padding-left: 0.75rem !important }
#note code { font-family: ui-monospace, monospace; font-weight: 600; white-space: nowrap }
#ask { gap: 0.5rem }
#ask button { font-size: 1rem; min-height: 2.75rem; padding: 0 }
.found { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 45%), 1fr)); gap: 1rem 0.75rem }
.found, figure { list-style: none; margin: 0; padding: 0 }
.found button { display: block; width: 100% }
.found img { aspect-ratio: 1; background: var(--background-fill-secondary); object-fit: contain; width: 100% }
.found img, .asked img, dialog { border-radius: 8px }
figcaption { font-size: 0.875rem; line-height: 1.4; margin-top: 0.25rem; overflow-wrap: anywhere }
figcaption span[title] { border-bottom: 1px dotted; cursor: help }
.asked, dialog form { align-items: center; display: flex; flex-wrap: wrap; gap: 0.5rem; margin-bottom: 0.75rem }
.asked img { height: 3.5rem }
.asked button, dialog button { background: var(--button-secondary-background-fill); border-radius: 8px }
.asked button, dialog button { color: var(--button-secondary-text-color); min-height: 2.75rem; padding: 0 0.75rem }
[role=alert] { font-weight: 600; margin-bottom: 0.75rem }
#found[aria-busy=true] { opacity: 0.5 }
dialog { background: var(--background-fill-primary); border: 1px solid var(--border-color-primary) }
dialog { color: var(--body-text-color); margin: auto; padding: 1rem; width: min(96vw, 50rem) }
dialog::backdrop { background: rgb(0 0 0 / 0.6) }
dialog img { max-height: 60vh; object-fit: contain; width: 100% }
dialog figcaption > * { border: 0 !important; display: block }
dialog figcaption > span[title]::after { content: " – " attr(title) }
dialog .caption::before { content: "The model's caption: " }
dialog figcaption :is(br, small) { display: none }
dialog input { background: none; border: 1px solid; margin: 0.75rem 0; padding: 0.5rem; width: 100% }
:focus-visible { outline: 3px solid #3b82f6 !important; outline-offset: 2px !important }
:is(textarea, [type=number], [type=range]):focus-visible { outline-offset: -2px !important }
@media (max-width: 600px) {
    #note { font-size: 0.875rem } .column { gap: 0.5rem } .column:has(> #found [role]) > #top { display: none }
}
"""
DIALOG = """<dialog closedby="any" aria-label="An image"><figure><img alt=""><figcaption></figcaption></figure>
<input readonly aria-label="Path of the file"><form method="dialog"><button type="button" data-do="copy"></button>
<button data-do="like">More like this</button><button autofocus>Close</button></form></dialog>"""
# Queries made while one is running wait in the browser, so that every answer is shown, in the order of the queries.
# Gradio does not guarantee that: with its queue answers get lost, because the browser closes the event stream whenever
# none is due, even if another query was just sent; without it they come in any order, and the page does not learn of
# errors.
START = """() => {
    const one = selector => document.querySelector(selector);
    const call = async (name, data) => {
        const body = JSON.stringify({data}), headers = {'Content-Type': 'application/json'};
        const response = await fetch(`gradio_api/run/${name}`, {method: 'POST', headers, body});
        return (await response.json()).data[0];
    };
    window.ask = (words, picture, like, switches) => {
        window.last = {picture, like};
        one('#found').setAttribute('aria-busy', 'true');
        if (matchMedia('(pointer: coarse)').matches) document.activeElement.blur();  // its keyboard hides the results
        const mine = window.answered = (window.answered ?? Promise.resolve())
            .then(() => call('answer', [words, picture, like, ...switches]))
            .catch(() => '<p role="alert">⚠ No answer. Is the program that serves this page still running?</p>')
            .finally(() => { if (window.answered === mine) one('#found').removeAttribute('aria-busy'); });
        return mine;
    };
    const search = (words, like) => { window.query = {words, like}; one('#again').click(); };
    const actions = {
        try: button => search(button.innerText, ''),
        like: () => search('', one('dialog').dataset.uri),
        copy: button => {
            one('dialog input').select();
            if (document.execCommand('copy')) button.innerText = 'Copied';  // the newer way may need https
        },
        open: async button => {
            const {uri, path} = button.dataset;
            one('dialog').dataset.uri = uri;
            one('dialog img').src = button.querySelector('img').src;
            one('dialog figcaption').innerHTML = button.nextElementSibling.innerHTML;
            one('dialog input').value = path;
            one('[data-do=copy]').innerText = 'Copy path';
            one('dialog').showModal();
            const source = await call('large', [uri]).catch(() => '');
            if (source && one('dialog').dataset.uri === uri) one('dialog img').src = source;
        },
    };
    document.addEventListener('click', ({target}) => {
        const button = target.closest('[data-do]');
        if (button) actions[button.dataset.do](button);
    });
    document.addEventListener('dragover', event => event.preventDefault());
    document.addEventListener('drop', event => {
        if (!event.dataTransfer.files.length) return;
        event.preventDefault();
        one('#ask input[type=file]').files = event.dataTransfer.files;
        one('#ask input[type=file]').dispatchEvent(new Event('change', {bubbles: true}));
    });
}"""
BY_WORDS = "(words, ...switches) => ask(words, null, '', switches)"
BY_PICTURE = "async (picture, ...switches) => [await ask('', picture, '', switches), '', null]"
BY_CLICK = "async (...switches) => [await ask(query.words, null, query.like, switches), query.words]"
AGAIN = """(found, words, ...switches) =>
    words || window.last ? ask(words, window.last?.picture ?? null, window.last?.like ?? '', switches) : found"""


def source(image: bytes) -> str:
    """WebP as an address for <img>."""
    return f"data:image/webp;base64,{base64.b64encode(image).decode()}"


def card_html(path: str, thumbnail: bytes, lines: list[str]) -> str:
    """An image of the grid, which opens large, above lines of HTML. File names and captions are untrusted text."""
    name, whole = html.escape(printable(os.path.basename(path))), html.escape(printable(path))
    real = html.escape(os.fsencode(path).decode(errors="backslashreplace"))  # to be copied
    button = f"<button data-do='open' data-uri='{uri_of(path)}' data-path='{real}' aria-label='Open {name}'>"
    caption = "<br>".join([*lines, f"<small title='{whole}'>{name}</small>"])
    image = f"{button}<img src='{source(thumbnail)}' alt=''></button>"
    return f"<li><figure>{image}<figcaption>{caption}</figcaption></figure></li>"


def result_html(result: Result) -> str:
    lines = [f"<span title='{SIMILARITY}'>similarity <b>{result.cosine:.3f}</b></span>"]
    if result.match is not None:
        lines.insert(0, f"<span title='{RANK}'>rank <b>{result.score:.2f}</b></span>")
        lines.append(f"<span title='{MATCH}'>match {result.match:.0%}</span>")
    if result.label is not None:
        lines.append(f"<span title='{LABEL}'>{html.escape(result.label)} {result.share:.0%}</span>")
    if result.caption is not None:
        lines.append(f"<span class='caption'>“{html.escape(result.caption)}”</span>")
    if result.gone:
        lines.append("<em>The file is no longer there.</em>")
    return card_html(result.path, result.thumbnail, lines)


def start_html(searcher: Searcher) -> str:
    """What the page shows before the first query."""
    queries = TRIES["tiny" if searcher.embedder.is_tiny else "14B"]
    tries = "".join(f"<button data-do='try'>{words}</button>" for words in queries)
    cards = "".join(card_html(path_of(row["uri"]), row["thumbnail"], []) for row in searcher.sample(12))
    return f"<div class='asked'>Try: {tries}</div><ul class='found'>{cards}</ul>"


def make_answer(searcher: Searcher):
    """The function behind the page: a query and its settings -> HTML."""

    def answer(words: str, picture: str | None, like: str, mode: str, rerank: bool, labels: str, k: int) -> str:
        like, start = path_of(like or ""), time.perf_counter()
        shown = picture or like
        words = "" if shown else (words or "").strip()
        names = [name.strip() for name in re.split("[,，、\n]", labels or "") if name.strip()] or None
        asked, image = printable(os.path.basename(shown)) if shown else f"“{words}”", ""
        try:
            if not words and not shown:
                raise SearchError("Type what the image shows, or give an image.")
            results = searcher.search(words, picture or "", int(k or 12), mode, rerank and bool(words), names, like)
            about = f"The {len(results)} images closest to {asked}, in {time.perf_counter() - start:.2f}\u00a0s"
            about += ". No second look: it needs words." if rerank and shown else ""
            if shown:
                small = make_thumbnail(searcher.embedder.decode(read_bytes(picture))) if picture else None
                small = small or searcher.row(like)["thumbnail"]
                image = f"<img src='{source(small)}' alt='The image of this query'>"
            if picture and names:
                shares = searcher.classify(picture, names, mode)
                about += ". This image: " + ", ".join(f"{name} {share:.0%}" for name, share in shares)
        except SearchError as error:
            return f"<p role='alert'>⚠ {html.escape(str(error))}</p>" + ("" if words or shown else start_html(searcher))
        line = f"<div class='asked'>{image}<p role='status'>{html.escape(about)}</p></div>"
        return f"{line}<ul class='found'>{''.join(map(result_html, results))}</ul>"

    return answer


def make_page(searcher: Searcher) -> gr.Blocks:
    def large(uri: str) -> str:
        """An indexed image as an address for <img>; empty if its file cannot be read."""
        try:
            known = searcher.row(path_of(uri)) is not None
            return source(make_thumbnail(searcher.embedder.decode(read_bytes(path_of(uri))), LARGE)) if known else ""
        except DAMAGED:
            return ""

    # Uploaded images are deleted after an hour.
    with gr.Blocks(title="Search your images", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        language = "English, Chinese or Japanese" if searcher.embedder.is_tiny else "any language"
        plain = {"apply_default_css": False}
        about = f"Find images by what they show: type words in {language}, or drop an image anywhere on this page."
        gr.HTML(f"<h1>Search your images</h1><p>{about}</p>", elem_id="top", **plain)
        if searcher.note:
            note = re.sub(r"--\w+ [A-Z]\S*\w", r"<code>\g<0></code>", searcher.note.replace("`", ""))
            gr.HTML(f"<p>{note}</p>", elem_id="note", **plain)
        with gr.Row(elem_id="ask"):
            hint = f"Search {searcher.index.count():,} images"
            look = {"show_label": False, "container": False, "max_lines": 3, "scale": 4, "min_width": 300}
            words = gr.Textbox(label=hint, placeholder=hint, autofocus=True, elem_id="words", **look)
            button = gr.Button("Search", variant="primary", min_width=90)
            picture = gr.UploadButton("By an image…", min_width=120, elem_id="picture")
        with gr.Accordion("Options", open=False, elem_id="options"):
            info = "By sight: words are compared with what the vision model sees. By sight and language: the language "
            info += "model looks at the image too, which in the paper finds the right one more often."
            mode = gr.Radio(MODES, value=MODES[0][1], label="How images are compared", info=info, elem_id="mode")
            info = "Compare the words with the best images once more, and sort them anew; slower."
            rerank = gr.Checkbox(label="Take a second look (re-ranking)", info=info, elem_id="rerank")
            info = "Two or more, with commas between them, then Enter: each image shows the likeliest."
            labels = gr.Textbox(label="Labels", info=info, placeholder="panda, 狐狸, すし", elem_id="labels")
            k = gr.Slider(1, 60, value=12, step=1, label="Number of results", elem_id="k")
        found = gr.HTML(start_html(searcher), elem_id="found", **plain)
        gr.HTML(DIALOG, **plain)

        switches = [mode, rerank, labels, k]
        hidden, like = gr.Button(visible=False), gr.Textbox(visible=False)
        hidden.click(make_answer(searcher), [words, picture, like, *switches], found, api_name="answer", queue=False)
        gr.api(large, api_name="large", queue=False)
        gr.on([words.submit, button.click], None, [words, *switches], found, js=BY_WORDS, trigger_mode="multiple")
        # This also empties the field, so that the next image can be dropped.
        picture.upload(None, [picture, *switches], [found, words, picture], js=BY_PICTURE, trigger_mode="multiple")
        again = gr.Button(visible="hidden", elem_id="again")
        again.click(None, switches, [found, words], js=BY_CLICK, trigger_mode="multiple")
        changes = [mode.change, rerank.change, labels.submit, k.release]
        gr.on(changes, None, [found, words, *switches], found, js=AGAIN, trigger_mode="multiple")
    return page


def serve(searcher: Searcher, host: str, port: int) -> None:
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="blue", **fonts).set(
        button_primary_background_fill="*primary_600", button_primary_background_fill_dark="*primary_600",
        body_text_color_subdued="*neutral_600", block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
        checkbox_border_color="*neutral_500", checkbox_border_color_dark="*neutral_400",
    )  # fmt: skip
    look = {"theme": theme, "css": CSS, "js": START, "footer_links": []}
    if searcher.note:
        print(searcher.note)
    # Gradio's own message would suggest publishing the page.
    print(f"Serving on http://{host}:{port}; stop with Ctrl-C.", flush=True)
    try:
        make_page(searcher).launch(server_name=host, server_port=port, share=False, quiet=True, **look)
    except OSError as error:  # the port is taken
        raise SearchError(f"`--host {host} --port {port}`: {error}") from error
