"""What a new user sees first: `make demo`, and what `make` says before it installs."""

import json
import re
import shutil
import subprocess
import sys

import demo  # noqa: E402
import pytest

from conftest import ROOT

PICTURES = ROOT / "examples" / "pictures"


def test_the_demo_ends_with_three_commands_that_exist(tmp_path, monkeypatch, capsys):
    entries = json.loads((PICTURES / "examples.json").read_text("utf-8"))[:3]
    for entry in entries:
        shutil.copy(PICTURES / entry["file"], tmp_path)
    (tmp_path / "examples.json").write_text(json.dumps(entries), "utf-8")
    command = ["demo.py", "--pictures", str(tmp_path), "--out", str(tmp_path / "demo.png")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(ROOT)
    demo.main()
    text = capsys.readouterr().out
    assert text.startswith("Loading tiny/") and (tmp_path / "demo.png").is_file()
    before, _, after = text.partition("\nNext:\n")
    commands = [re.split("  +", line.strip())[0] for line in after.splitlines()]
    assert len(commands) == 3 and str(tmp_path / "demo.png") in before
    for command in commands:
        name, script = command.split()[:2]
        if name == "make":
            assert re.search(rf"^{script}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        else:
            assert shutil.which(name) and (ROOT / script).is_file()


@pytest.mark.parametrize("environment", [".venv", ".venv-readers", ".venv-app"])
def test_make_says_what_it_installs_before_it_does(environment):
    done = subprocess.run(
        ["make", "-n", "-B", f"{environment}/ready"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said, installing, _ = done.stdout.partition(f"{environment}/bin/pip install")
    assert installing and re.search(rf"into {environment}: .* GB\.", said) and "minutes" in said
