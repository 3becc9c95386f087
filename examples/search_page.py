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

import gradio as gr  # noqa: E402
from search_index import COLUMNS, Result, Searcher, SearchError, decode, printable, read_bytes, thumbnail  # noqa: E402

MODES = tuple(COLUMNS)
FONT = ["system-ui", "sans-serif"]
CSS = """
footer { display: none !important }
.found { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.75rem }
.found { list-style: none; margin: 0; padding: 0 }
.found figure { margin: 0 }
.found img { aspect-ratio: 1; background: #fff; border-radius: 6px; object-fit: contain; width: 100% }
.found figcaption { font-size: 0.85rem; line-height: 1.35; overflow-wrap: anywhere }
.found small { opacity: 0.75 }
.asked { align-items: center; display: flex; gap: 0.75rem }
.asked img { background: #fff; border-radius: 6px; height: 3.5rem }
#found[aria-busy=true] { opacity: 0.5 }
"""
# Questions that come while one is answered wait here, in the browser, so that answers are shown in the order of the
# questions and none is left out. Gradio's own queue loses answers here: its browser side closes the stream that they
# come by as soon as none is due, even if the next question was sent meanwhile. So it is not used.
ASK = """(...fields) => new Promise(go => {
    window.questions ??= [];
    window.questions.push(() => go(fields));
    document.querySelector('#found').setAttribute('aria-busy', 'true');
    if (window.questions.length === 1) window.questions[0]();
})"""
NEXT = """() => {
    window.questions.shift();
    if (window.questions.length) window.questions[0]();
    else document.querySelector('#found').removeAttribute('aria-busy');
}"""
HOW = {"js": ASK, "queue": False, "trigger_mode": "multiple", "show_progress": "hidden"}


def image(thumbnail: bytes, text: str) -> str:
    return f'<img src="data:image/webp;base64,{base64.b64encode(thumbnail).decode()}" alt="{html.escape(text)}">'


def shown(result: Result) -> str:
    """A picture of the grid. Names of files and captions are foreign text."""
    lines = [f"<b>{result.cosine:.3f}</b>"]
    if result.match is not None:
        lines[0] += f" · match {result.match:.0%}"
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
            results = searcher.search(words, picture or "", int(k), mode, rerank and bool(words), names)
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
                    labels = gr.Textbox(
                        label="Labels to choose from", placeholder="panda, 狐狸, すし, then Enter", elem_id="labels"
                    )
                    k = gr.Slider(1, 60, value=12, step=1, label="How many", elem_id="k")
        found = gr.HTML(elem_id="found")
        gr.Markdown(f"<small>{html.escape(about['model'])} {html.escape(about['subfolder'])}</small>")

        with_picture = gr.State()  # the last one asked with; its field is empty again and takes the next one
        switches = [mode, rerank, labels, k]
        questions = (
            gr.on([words.submit, button.click], lambda words, *given: (answer(words, None, *given), None),
                  [words, *switches], [found, with_picture], api_name="words", **HOW),
            picture.upload(lambda picture, *given: (answer("", picture, *given), "", None, str(picture)),
                           [picture, *switches], [found, words, picture, with_picture], api_name="picture", **HOW),
            gr.on([mode.change, rerank.change, labels.submit, k.release], answer, [words, with_picture, *switches],
                  [found], api_name="again", **HOW),
        )  # fmt: skip
        for each in questions:
            each.then(None, js=NEXT)
    return page


def serve(searcher: Searcher, host: str, port: int) -> None:
    theme = gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"])
    try:
        make_page(searcher).launch(server_name=host, server_port=port, theme=theme, css=CSS, share=False, quiet=False)
    except OSError as error:  # the port is taken
        raise SearchError(f"`--host {host} --port {port}`: {error}") from error
