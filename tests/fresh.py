"""Fresh processes in a tenth of a second: an interpreter that has imported torch and transformers forks for each
script.

A new interpreter takes five seconds to import what nearly every script needs. This server imports it once, runs no
operation and starts no thread. A fork of it is therefore equal to `python -c CODE` after its imports. Three kinds of
tests need a real interpreter (`run_interpreter` in conftest.py): tests that check what was imported, tests of an
environment variable that is read during imports, and tests of commands as users start them. Packages that a server
hides are absent in all its forks.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import traceback
from importlib.machinery import PathFinder
from pathlib import Path

HIDDEN = "FRESH_HIDDEN_PACKAGES"
PRELOADED = (
    "numpy PIL.Image sentencepiece safetensors.torch torch torch._dynamo torch.nn.functional transformers"
    " transformers.dynamic_module_utils transformers.modeling_utils transformers.generation.utils"
    " transformers.processing_utils transformers.tokenization_utils transformers.pipelines"
    " transformers.models.auto.modeling_auto transformers.models.auto.processing_auto"
    " transformers.models.auto.image_processing_auto transformers.models.auto.tokenization_auto"
).split()


# ------------------------------------------------------------------------------------------------- in the server


def serve() -> None:
    """Answer each request, a line of JSON, with the return code of a fork that ran it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep the output of imports out of the answers
    del sys.path[0]  # this file's folder, which is not on the path of a user's script
    hide(os.environ.pop(HIDDEN, "").split())
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:  # in another version of transformers; the script imports what it needs itself
            pass
    gc.collect()
    gc.freeze()  # so that a fork's garbage collector does not touch, and thereby copy, existing objects
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def hide(packages: list[str]) -> None:
    """Make imports behave as if these packages were not installed."""

    class Finder(PathFinder):
        @classmethod
        def find_spec(cls, name, *others):
            return None if name.split(".")[0] in packages else super().find_spec(name, *others)

    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder


def run(request: dict) -> None:
    """Become `python COMMAND`, and end."""
    code = 1
    try:
        become(request)
        execute(*request["command"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code & 0xFF)


def execute(first: str, *rest: str) -> None:
    """Do what `python -c CODE ARGUMENTS...`, `-m MODULE ARGUMENTS...` or `SCRIPT ARGUMENTS...` does."""
    path = os.environ.get("PYTHONPATH")
    sys.path[:0] = path.split(os.pathsep) if path else []
    if first == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = [*rest]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = type(sys)("__main__")
    if first == "-c":
        source, name, sys.argv = rest[0], "<string>", [first, *rest[1:]]
        sys.path.insert(0, "")
    else:
        source, name, sys.argv = Path(first).read_text("utf-8"), first, [first, *rest]
        main.__file__ = first
        sys.path.insert(0, os.path.dirname(first))
    exec(compile(source, name, "exec"), main.__dict__)


def become(request: dict) -> None:
    """Take over the folder, the streams and the environment, with its own cache of remote code."""
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags), number)
    sys.stdin = open(0, closefd=False)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    # transformers reads this variable when it is imported, and its modules copy the value from each other.
    for module in list(sys.modules.values()):
        if "HF_MODULES_CACHE" in getattr(module, "__dict__", ()):
            module.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]


# -------------------------------------------------------------------------------------------------- in the tests


class Server:
    """The server of one test process, started when it is first needed; it ends with its standard input.

    Args:
        hidden (`str`): names of packages that cannot be imported.
    """

    def __init__(self, hidden: str = "") -> None:
        self.hidden = hidden
        self.process: subprocess.Popen | None = None

    def run(self, request: dict, seconds: float) -> int:
        """The return code of a fork that ran the request."""
        if self.process is None:
            environment = os.environ | {HIDDEN: self.hidden, "HF_HUB_OFFLINE": "1"}  # the latter is read during imports
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            # A new session has no terminal, so nothing can ask the user, and `stop` reaches all forks.
            command = [sys.executable, __file__]
            self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
            atexit.register(self.stop)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        answer = self.process.stdout.readline() if ready else ""
        if not answer:
            self.stop()
            raise TimeoutError(f"no end after {seconds} seconds, or the server died: {request['command']}")
        return int(answer)

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdin.close()
            process.stdout.close()


if __name__ == "__main__":
    serve()
