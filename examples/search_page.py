"""Makes the web page of search.py: `python examples/search.py page`.

Enter searches for words, dropping an image searches for that; any other change repeats the last query. All results come
from the index, thumbnails included, so the folders themselves are not served. The page loads nothing from outside this
machine: no fonts, no analytics.
"""

import base64
import html
import os
import re
import time

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported

import gradio as gr
from search_index import COLUMNS, Result, Searcher, SearchError, make_thumbnail, printable, read_bytes

MODES = tuple(COLUMNS)
CSS = """
footer { display: none !important }
.found { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 45%), 1fr)); gap: 0.75rem }
.found { list-style: none; margin: 0; padding: 0 }
.found figure { margin: 0 }
.found img { aspect-ratio: 1; background: #fff; border-radius: 6px; object-fit: contain; width: 100% }
.found figcaption { font-size: 0.85rem; line-height: 1.35; overflow-wrap: anywhere }
.found small { opacity: 0.75 }
.asked { align-items: center; display: flex; gap: 0.75rem; margin-bottom: 0.75rem }
.asked img { background: #fff; border-radius: 6px; height: 3.5rem }
#found[aria-busy=true] { opacity: 0.5 }
"""
# Calls the endpoint `answer` (see `api_name` below). Queries made while one is running wait in the browser, so that
# every answer is shown, in the order of the queries. Gradio does not guarantee that: with its queue answers get lost,
# because the browser closes the event stream whenever none is due, even if another query was just sent; without it they
# come in any order, and the page does not learn of errors.
ASK = """async (words, picture, ...switches) => {
    const found = document.querySelector('#found'), before = window.answered ?? Promise.resolve();
    let done;
    window.answered = new Promise(resolve => { done = resolve; });
    window.waiting = (window.waiting ?? 0) + 1;
    window.picture = picture;
    found.setAttribute('aria-busy', 'true');
    await before;
    try {
        const body = JSON.stringify({data: [words, picture, ...switches]});
        const headers = {'Content-Type': 'application/json'};
        const response = await fetch('gradio_api/run/answer', {method: 'POST', headers, body});
        const {data, error} = await response.json();
        if (!response.ok) throw new Error(error ?? response.statusText);
        return data[0];
    } catch (error) {
        const line = document.createElement('p');
        line.setAttribute('role', 'alert');
        line.innerText = `⚠ No answer: ${error.message}`;
        return line.outerHTML;
    } finally {
        window.waiting -= 1;
        if (!window.waiting) found.removeAttribute('aria-busy');
        done();
    }
}"""
BY_WORDS = f"(words, ...switches) => ({ASK})(words, null, ...switches)"
BY_PICTURE = f"async (picture, ...switches) => [await ({ASK})('', picture, ...switches), '', null]"
AGAIN = f"(words, ...switches) => ({ASK})(words, window.picture ?? null, ...switches)"


def image_html(thumbnail: bytes, text: str) -> str:
    return f'<img src="data:image/webp;base64,{base64.b64encode(thumbnail).decode()}" alt="{html.escape(text)}">'


def result_html(result: Result) -> str:
    """An item of the grid. File names and captions are untrusted text."""
    lines = [f"<b>{result.cosine:.3f}</b>"]
    if result.match is not None:
        lines = [f"<b>{result.score:.2f}</b> · cosine {result.cosine:.3f} · match {result.match:.0%}"]
    if result.label is not None:
        lines.append(f"{html.escape(result.label)} {result.share:.0%}")
    if result.caption is not None:
        lines.append(f"“{html.escape(result.caption)}”")
    path = html.escape(printable(result.path))
    lines.append(f'<small title="{path}">{html.escape(printable(os.path.basename(result.path)))}</small>')
    if result.gone:
        lines.append("<small>no longer there</small>")
    image = image_html(result.thumbnail, result.caption or "")
    return f"<li><figure>{image}<figcaption>{'<br>'.join(lines)}</figcaption></figure></li>"


def make_answer(searcher: Searcher):
    """The function behind the page: a query and its settings -> HTML."""

    def answer(words: str, picture: str | None, mode: str, rerank: bool, labels: str, k: int) -> str:
        words = "" if picture else (words or "").strip()
        if not words and not picture:
            return ""
        names = [name.strip() for name in re.split("[,，、\n]", labels or "") if name.strip()] or None
        asked = printable(os.path.basename(picture)) if picture else f"“{words}”"
        start, image = time.perf_counter(), ""
        try:
            results = searcher.search(words, picture or "", int(k or 12), mode, rerank and bool(words), names)
            about = f"{len(results)} for {asked} in {time.perf_counter() - start:.2f} s"
            if picture:
                small = make_thumbnail(searcher.embedder.decode(read_bytes(picture)))
                image = image_html(small, "the image of this query")
                about += "; not re-ranked, which needs words" if rerank else ""
            if picture and names:
                shares = searcher.classify(picture, names, mode)
                about += "; this image: " + ", ".join(f"{name} {share:.0%}" for name, share in shares)
        except SearchError as error:
            return f"<p role='alert'>⚠ {html.escape(str(error))}</p>"
        line = f"<div class='asked'>{image}<p role='status'>{html.escape(about)}</p></div>"
        return f"{line}<ul class='found'>{''.join(map(result_html, results))}</ul>"

    return answer


def make_page(searcher: Searcher) -> gr.Blocks:
    answer = make_answer(searcher)
    about = searcher.embedder.about
    # Uploaded images are deleted after an hour.
    with gr.Blocks(title="Search your images", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        with gr.Row(equal_height=True):
            label, hint = f"Search {searcher.index.count():,} images", "Words in any language, then Enter"
            words = gr.Textbox(label=label, placeholder=hint, autofocus=True, scale=4, elem_id="words")
            button = gr.Button("Search", variant="primary", scale=1, min_width=100)
        with gr.Row():
            picture = gr.File(label="or with an image: drop it here", height=150, scale=1, elem_id="picture")
            with gr.Column(scale=2):
                with gr.Row():
                    mode = gr.Radio(MODES, value=MODES[0], label="Mode", elem_id="mode")
                    rerank = gr.Checkbox(label="Re-rank the best", elem_id="rerank")
                with gr.Row():
                    labels = gr.Textbox(label="Labels, then Enter", placeholder="panda, 狐狸, すし", elem_id="labels")
                    k = gr.Slider(1, 60, value=12, step=1, label="How many", elem_id="k")
        found = gr.HTML(elem_id="found")
        gr.Markdown(f"<small>{html.escape(about['model'])} {html.escape(about['subfolder'])}</small>")

        switches = [mode, rerank, labels, k]
        hidden = gr.Button(visible=False)
        hidden.click(answer, [words, picture, *switches], found, api_name="answer", queue=False)
        gr.on([words.submit, button.click], None, [words, *switches], found, js=BY_WORDS, trigger_mode="multiple")
        # This also empties the field, so that the next image can be dropped.
        picture.upload(None, [picture, *switches], [found, words, picture], js=BY_PICTURE, trigger_mode="multiple")
        changes = [mode.change, rerank.change, labels.submit, k.release]
        gr.on(changes, None, [words, *switches], found, js=AGAIN, trigger_mode="multiple")
    return page


def serve(searcher: Searcher, host: str, port: int) -> None:
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    # Gradio's own message would suggest publishing the page.
    print(f"Serving on http://{host}:{port}; stop with Ctrl-C.", flush=True)
    try:
        make_page(searcher).launch(server_name=host, server_port=port, theme=theme, css=CSS, share=False, quiet=True)
    except OSError as error:  # the port is taken
        raise SearchError(f"`--host {host} --port {port}`: {error}") from error
