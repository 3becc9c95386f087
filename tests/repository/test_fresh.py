"""A fork of the preloaded interpreter of fresh.py behaves like a new interpreter."""

import json
import os
import signal
import subprocess
import sys

import pytest

from conftest import ROOT, run_fork, run_interpreter, run_python
from fresh import Server

STATE = """
import json, os, sys
state = {"argv": sys.argv, "first": sys.path[0], "folder": os.getcwd(), "name": __name__, "stdin": sys.stdin.read()}
state |= {"cache": os.environ["HF_MODULES_CACHE"], "bare": [each for each in sys.path if each.endswith("tests")]}
print(json.dumps(state))
"""


def test_a_fork_is_like_a_new_interpreter(tmp_path):
    found, wanted = (json.loads(run(STATE, tmp_path, "a", 1).stdout) for run in (run_python, run_interpreter))
    assert found == wanted
    assert found["argv"] == ["-c", "a", "1"] and found["folder"] == str(tmp_path) and found["bare"] == []


def test_a_script_runs_as_from_the_command_line(tmp_path):
    (tmp_path / "beside.py").write_text("value = 3")
    script = tmp_path / "script.py"
    script.write_text("import sys, beside\nprint(__name__, __file__, sys.argv, beside.value)")
    done = run_fork([script, "x"], ROOT)
    assert done.stdout.split("\n")[0] == f"__main__ {script} {[str(script), 'x']} 3"


def test_a_module_runs_as_from_the_command_line(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text("import sys\nprint(__name__, __file__, sys.argv, sys.path[:2])")
    (tmp_path / "elsewhere").mkdir()
    command = ["-m", "package.module", "x"]
    done = run_fork(command, tmp_path / "elsewhere", PYTHONPATH=str(tmp_path))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    options = {"capture_output": True, "text": True, "cwd": tmp_path / "elsewhere", "env": environment}
    assert done.stdout == subprocess.run([sys.executable, *command], **options).stdout != ""


@pytest.mark.parametrize(
    "code, status, said",
    [
        ("", 0, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import atexit, sys; atexit.register(print, 'end', file=sys.stderr)", 0, "end\n"),
    ],
)
def test_return_codes(tmp_path, code, status, said):
    done = run_fork(["-c", code], tmp_path)
    assert done.returncode == status and done.stderr.endswith(said) and bool(done.stderr) == bool(said)


def test_code_is_copied_into_the_cache_of_the_fork_and_nothing_else_is_shared(flat, tmp_path):
    code = """
import os, sys, transformers
sys.modules["left.behind"] = transformers.left_behind = sys
from transformers import AutoConfig
print(sys.modules[type(AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)).__module__].__file__)
"""
    assert run_python(code, tmp_path, flat).stdout.startswith(str(tmp_path / "modules"))
    code = "import sys, transformers; print('left.behind' in sys.modules, hasattr(transformers, 'left_behind'))"
    assert run_python(code, tmp_path).stdout == "False False\n"


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads as Linux shows them")
def test_the_server_has_imported_everything_and_started_no_thread(tmp_path):
    """A fork has only the thread that forked; waiting for another thread would never end."""
    code = "import os, sys; print(len(os.listdir(f'/proc/{os.getppid()}/task')), 'transformers' in sys.modules)"
    assert run_python(code, tmp_path).stdout == "1 True\n"


def test_a_script_that_hangs_is_stopped_with_an_error(tmp_path):
    server = Server()
    request = {"command": ["-c", "while True: pass"], "folder": str(tmp_path)}
    request |= {"stdout": str(tmp_path / "o"), "stderr": str(tmp_path / "e"), "environment": dict(os.environ)}
    with pytest.raises(TimeoutError, match="while True"):
        server.run(request, seconds=0.1)
    assert server.process is None
