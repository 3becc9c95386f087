"""Search your own images by words in any language, or by an image.

    python examples/search.py index FOLDER                  # again after changes: reads only what changed
    python examples/search.py query "熊猫"                  # the images that match best
    python examples/search.py query "panda" --rerank --mode InternVL-G --labels panda fox lion
    python examples/search.py query --picture FILE -k 5 --json
    python examples/search.py problems                      # files that are not indexed, and why
    python examples/search.py page                          # the same in a browser, on this machine only

For photographs use the 14B: add `--model ORG/InternVL-14B`, where ORG publishes this repository, or the path of your
copy. The default model is the tiny checkpoint of this repository, which only knows emoji. With a GPU and accelerate,
what does not fit on the GPU stays in RAM. The index is in `.cache/search` of the repository, or in `--index`; it can
hold any number of folders, but only one model and one `--crop`.
The folders themselves are only read. A file is an image by its name or its first bytes; of an animation the first frame
counts. An interrupted run loses at most the last ten seconds of work; the same command continues. Files that cannot be
read do not stop it: `problems` lists them with the reason.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from search_index import COLUMNS, EMOJI, NOTE, Embedder, Index, Searcher, SearchError, check_question, printable

ROOT = Path(__file__).resolve().parents[1]
MODES = tuple(COLUMNS)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--index", default=ROOT / ".cache" / "search", help="folder of the index")
    model = argparse.ArgumentParser(add_help=False, parents=[common])
    model.add_argument("--model", help="folder or Hub id of the model; this repository's tiny checkpoint if not given")
    model.add_argument("--subfolder", default="", help="of the model")
    model.add_argument("--crop", default="squash", choices=("squash", "center"), help="how images become square")
    about, _, more = __doc__.partition("\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=more, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable, parent: argparse.ArgumentParser, about: str) -> Callable:
        found = commands.add_parser(run.__name__, parents=[parent], help=about)
        found.set_defaults(run=run)
        return found.add_argument

    add = command(index, model, "bring the index up to date with folders")
    add("folders", nargs="+", type=Path, metavar="FOLDER")
    about = "write a caption for each image, which is slower (default: yes; for tiny only in examples/pictures)"
    add("--captions", action=argparse.BooleanOptionalAction, help=about)
    add("--rebuild", action="store_true", help="delete the index first")
    add("--allow-empty", action="store_true", help="drop all images of a folder that has none now")

    add = command(query, model, "find images")
    add("words", nargs="?", default="", help="in any language that the model knows")
    add("--picture", default="", metavar="FILE", help="search with an image instead of words")
    add("-k", type=int, default=12, help="number of results (%(default)s)")
    add("--mode", default=MODES[0], choices=MODES)
    add("--rerank", action="store_true", help="reorder the best by comparing them with the words")
    add("--labels", nargs="+", metavar="LABEL", help="classify each result")
    add("--json", action="store_true", help="print JSON")

    command(problems, common, "list the files that are not indexed, and why")

    add = command(page, model, "search in a browser")
    add("--host", default="127.0.0.1", help="0.0.0.0 shows your images to the whole network")
    add("--port", type=int, default=7860)

    options = parser.parse_args(arguments)
    if "model" in options and options.model is None:
        options.model, options.subfolder = str(ROOT), options.subfolder or "tiny"
    return options


def load_embedder(options: argparse.Namespace) -> Embedder:
    return Embedder(options.model, options.subfolder, options.crop)


def index(options: argparse.Namespace) -> None:
    missing = [printable(folder) for folder in options.folders if not folder.is_dir()]
    if missing:
        raise SearchError(f"FOLDER must be a folder; there is none of this name: {', '.join(missing)}")
    target, embedder = Index(options.index), load_embedder(options)
    unknown = [embedder.is_tiny and not folder.resolve().is_relative_to(EMOJI) for folder in options.folders]
    if any(unknown):
        without = " It writes no captions here; `--captions` changes that." if options.captions is None else ""
        print(f"{NOTE} With make: `PICTURES=FOLDER MODEL=ORG/InternVL-14B make app`.{without}", file=sys.stderr)
    for number, folder in enumerate(options.folders):
        rebuild = options.rebuild and number == 0
        captions = not unknown[number] if options.captions is None else options.captions
        report = target.update(folder, embedder, captions, rebuild, options.allow_empty)
        print(
            f"{printable(folder)}: {report.embedded} embedded, {report.taken_over} moved or touched, "
            f"{report.unchanged} unchanged, {report.dropped} dropped, {report.problems} with problems"
        )
        if report.others:
            kinds = ", ".join(f"{count} {printable(ending)}" for ending, count in report.others.most_common(8))
            print(f"  no images: {kinds}{' and others' if len(report.others) > 8 else ''}")
        if report.problems:
            print("  `problems` lists the files that could not be indexed")


def query(options: argparse.Namespace) -> None:
    check_question(options.words, options.picture, options.rerank)  # before the model is loaded
    wanted = {name: getattr(options, name) for name in ("words", "picture", "k", "mode", "rerank", "labels")}
    found = Index(options.index)
    found.open()
    searcher = Searcher(found, load_embedder(options))
    if searcher.note:
        print(searcher.note, file=sys.stderr)
    results = searcher.search(**wanted)
    if options.json:
        rows = [dataclasses.asdict(result) for result in results]
        for row in rows:
            del row["thumbnail"]
        print(json.dumps(rows, indent=1))
        return
    for result in results:
        scores = f"{result.cosine:.3f}"
        if result.match is not None:
            scores = f"{result.score:.2f}  cosine {scores}  match {result.match:.3f}"
        label = "" if result.label is None else f"  {result.label} {result.share:.0%}"
        caption = "" if result.caption is None else f"  “{result.caption}”"
        gone = "  (no longer there)" if result.gone else ""
        print(f"{scores}  {printable(result.path)}{caption}{label}{gone}")


def problems(options: argparse.Namespace) -> None:
    found = Index(options.index).problems()
    for path, reason in found:
        print(f"{printable(path)}: {reason}")
    if not found:
        print("No problems.", file=sys.stderr)


def page(options: argparse.Namespace) -> None:
    found = Index(options.index)
    found.open()
    from search_page import serve  # gradio takes seconds to import, and only this command needs it

    serve(Searcher(found, load_embedder(options)), options.host, options.port)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        kept = " What was done is kept; the same command goes on." if options.run is index else ""
        sys.exit(f"\nInterrupted.{kept}")
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SearchError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
