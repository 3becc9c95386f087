"""The page of examples/search.py: `python examples/search.py page`.

Words are searched by Enter, a picture as soon as it is dropped; whatever else is changed repeats the last question.
What is shown comes from the index, small copies included, so the folders themselves are not served. Nothing outside
this machine is asked for: no fonts, no analytics.
"""

import base64
import html
import os
import re
import time

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported

import gradio as gr
from search_index import COLUMNS, Result, Searcher, SearchError, decode, printable, read_bytes, thumbnail

MODES = tuple(COLUMNS)
FONT = ["system-ui", "sans-serif"]
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
# Asks `answer`, which gets its arguments by this name below. Questions that come while one is answered wait in the
# browser, so answers are shown in the order of the questions, and none is left out. Gradio's own ways do not keep to
# that: its queue loses answers, as the browser's side closes the stream they come by whenever none is due, even if the
# next question was sent meanwhile; without the queue they come in any order, and after an error nothing tells the page.
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


def image(thumbnail: bytes, text: str) -> str:
    return f'<img src="data:image/webp;base64,{base64.b64encode(thumbnail).decode()}" alt="{html.escape(text)}">'


def shown(result: Result) -> str:
    """A picture of the grid. Names of files and captions are foreign text."""
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
    small = image(result.thumbnail, result.caption or "")
    return f"<li><figure>{small}<figcaption>{'<br>'.join(lines)}</figcaption></figure></li>"


def make_answer(searcher: Searcher):
    """The function behind the page: a question and the switches -> a line about the answer, and pictures: HTML."""

    def answer(words: str, picture: str | None, mode: str, rerank: bool, labels: str, k: int) -> str:
        words = "" if picture else (words or "").strip()
        if not words and not picture:
            return ""
        names = [name.strip() for name in re.split("[,，、\n]", labels or "") if name.strip()] or None
        asked = printable(os.path.basename(picture)) if picture else f"“{words}”"
        start, small = time.perf_counter(), ""
        try:
            results = searcher.search(words, picture or "", int(k or 12), mode, rerank and bool(words), names)
            about = f"{len(results)} for {asked} in {time.perf_counter() - start:.2f} s"
            if rerank and not words:
                about += "; not re-ranked, which needs words"
            if picture and names:
                shares = searcher.classify(picture, names, mode)
                about += "; the picture: " + ", ".join(f"{name} {share:.0%}" for name, share in shares)
            if picture:
                small = image(thumbnail(decode(read_bytes(picture))), "the picture that was asked with")
        except SearchError as error:
            return f"<p role='alert'>⚠ {html.escape(str(error))}</p>"
        line = f"<div class='asked'>{small}<p role='status'>{html.escape(about)}</p></div>"
        return f"{line}<ul class='found'>{''.join(map(shown, results))}</ul>"

    return answer


def make_page(searcher: Searcher) -> gr.Blocks:
    answer = make_answer(searcher)
    about = searcher.embedder.about
    # Uploaded pictures are deleted after an hour.
    with gr.Blocks(title="Search your pictures", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        with gr.Row(equal_height=True):
            words = gr.Textbox(
                label=f"Search {searcher.index.count():,} pictures",
                placeholder="Words in any language, then Enter",
                autofocus=True,
                scale=4,
                elem_id="words",
            )
            button = gr.Button("Search", variant="primary", scale=1, min_width=100)
        with gr.Row():
            picture = gr.File(label="or with a picture: drop it here", height=150, scale=1, elem_id="picture")
            with gr.Column(scale=2):
                with gr.Row():
                    mode = gr.Radio(MODES, value=MODES[0], label="Mode", elem_id="mode")
                    rerank = gr.Checkbox(label="Re-rank: look at the best once more", elem_id="rerank")
                with gr.Row():
                    labels = gr.Textbox(label="Labels, then Enter", placeholder="panda, 狐狸, すし", elem_id="labels")
                    k = gr.Slider(1, 60, value=12, step=1, label="How many", elem_id="k")
        found = gr.HTML(elem_id="found")
        gr.Markdown(f"<small>{html.escape(about['model'])} {html.escape(about['subfolder'])}</small>")

        switches = [mode, rerank, labels, k]
        hidden = gr.Button(visible=False)
        hidden.click(answer, [words, picture, *switches], found, api_name="answer", queue=False)
        gr.on([words.submit, button.click], None, [words, *switches], found, js=BY_WORDS, trigger_mode="multiple")
        # The picture's field is empty again, so that the next one can be dropped.
        picture.upload(None, [picture, *switches], [found, words, picture], js=BY_PICTURE, trigger_mode="multiple")
        gr.on(
            [mode.change, rerank.change, labels.submit, k.release],
            None, [words, *switches], found, js=AGAIN, trigger_mode="multiple",
        )  # fmt: skip
    return page


def serve(searcher: Searcher, host: str, port: int) -> None:
    theme = gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"])
    # Gradio's own lines would advise to publish the page.
    print(f"Serving on http://{host}:{port}; Ctrl-C ends it.", flush=True)
    try:
        make_page(searcher).launch(server_name=host, server_port=port, theme=theme, css=CSS, share=False, quiet=True)
    except OSError as error:  # the port is taken
        raise SearchError(f"`--host {host} --port {port}`: {error}") from error
