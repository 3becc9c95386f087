"""Search your own pictures by words in any language, or by a picture.

    python examples/search.py index FOLDER                  # and again whenever something changed: only that is read
    python examples/search.py query "熊猫"                  # the pictures that fit best
    python examples/search.py query "panda" --rerank --mode InternVL-G --labels panda fox lion
    python examples/search.py query --picture FILE -k 5 --json
    python examples/search.py problems                      # files that are not indexed, and why
    python examples/search.py page                          # the same in a browser, on this machine alone

Without `--model` it is the tiny checkpoint of this repository, which knows emoji; the published 14B is
`--model PATH_OR_ID`. The index lies in `.cache/search` of the clone, or in `--index`; the folders that
are indexed are only read. Files are pictures by their names or by their first bytes, and of an animation the first
picture is seen. Any number of folders may go into one index.

A run that is interrupted or killed loses at most the last ten seconds of work; the same command goes on. Files that
are damaged, too large or no pictures do not stop it: `problems` lists them with the reason. An index is of one model
and one `--crop`; search_index.py says how it is kept.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from search_index import COLUMNS, Embedder, Index, Searcher, SearchError, check_question, printable

ROOT = Path(__file__).resolve().parents[1]
MODES = tuple(COLUMNS)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--index", default=str(ROOT / ".cache" / "search"), help="folder of the index")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", default=str(ROOT), help="folder or Hub id of the model")
    model.add_argument("--subfolder", default=None, help="of the model; tiny without --model, otherwise none")
    model.add_argument("--crop", default="squash", choices=("squash", "center"), help="how pictures become square")
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="The head of this file shows the commands."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("index", parents=[common, model], help="bring the index up to date with folders")
    command.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    command.add_argument("--no-captions", action="store_true", help="write no captions, which is faster")
    command.add_argument("--rebuild", action="store_true", help="throw the index away first")
    command.add_argument("--allow-empty", action="store_true", help="drop all pictures of a folder that has none now")

    command = commands.add_parser("query", parents=[common, model], help="find pictures")
    command.add_argument("words", nargs="?", default="", help="in any language that the model knows")
    command.add_argument("--picture", default="", metavar="FILE", help="ask with a picture instead of words")
    command.add_argument("-k", type=int, default=12, help="how many (12)")
    command.add_argument("--mode", default=MODES[0], choices=MODES)
    command.add_argument("--rerank", action="store_true", help="compare the best with the words once more, and closer")
    command.add_argument("--labels", nargs="+", default=None, metavar="LABEL", help="classify what is found")
    command.add_argument("--json", action="store_true", help="for programs")

    commands.add_parser("problems", parents=[common], help="list the files that are not indexed, and why")

    command = commands.add_parser("page", parents=[common, model], help="search in a browser")
    command.add_argument("--host", default="127.0.0.1", help="0.0.0.0 shows your pictures to the whole network")
    command.add_argument("--port", type=int, default=7860)

    options = parser.parse_args(arguments)
    if "model" in options and options.subfolder is None:
        options.subfolder = "tiny" if options.model == str(ROOT) else ""
    return options


def index(options: argparse.Namespace) -> None:
    missing = [printable(str(folder)) for folder in options.folders if not folder.is_dir()]
    if missing:
        sys.exit(f"FOLDER must be a folder, and there is none of this name: {', '.join(missing)}")
    target, embedder = Index(options.index), Embedder(options.model, options.subfolder, options.crop)
    for number, folder in enumerate(options.folders):
        rebuild = options.rebuild and number == 0
        report = target.update(folder, embedder, not options.no_captions, rebuild, options.allow_empty)
        print(
            f"{printable(str(folder))}: {report.embedded} embedded, {report.taken_over} moved or touched, "
            f"{report.unchanged} unchanged, {report.dropped} dropped, {report.problems} with problems"
        )
        if report.others:
            kinds = ", ".join(f"{count} {printable(ending)}" for ending, count in report.others.most_common(8))
            print(f"  no pictures: {kinds}{' and others' if len(report.others) > 8 else ''}")
        if report.problems:
            print("  `problems` lists what could not be indexed")


def query(options: argparse.Namespace) -> None:
    check_question(options.words, options.picture, options.rerank)  # what is wrong is said before the model is loaded
    found = Index(options.index)
    found.open()
    searcher = Searcher(found, Embedder(options.model, options.subfolder, options.crop))
    wanted = {"words": options.words, "picture": options.picture, "k": options.k, "mode": options.mode}
    results = searcher.search(**wanted, rerank=options.rerank, labels=options.labels)
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
    from search_page import serve  # gradio takes seconds, and no other command needs it

    searcher = Searcher(found, Embedder(options.model, options.subfolder, options.crop))
    serve(searcher, options.host, options.port)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    try:
        {"index": index, "query": query, "problems": problems, "page": page}[options.command](options)
    except KeyboardInterrupt:
        kept = " What was done is kept; the same command goes on." if options.command == "index" else ""
        sys.exit(f"\nInterrupted.{kept}")
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SearchError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
