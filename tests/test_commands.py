"""The command `cmcgns`: the same jobs with the same arguments as the scripts in jobs/."""

import importlib
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cmcgns.cli import invocation
from cmcgns.commands import COMMANDS, main
from tests.jobs import REPOSITORY

SCRIPTS = sorted(path.stem for path in (REPOSITORY / "jobs").glob("*.py"))
WITHOUT_SETTINGS = {"report"}


def by_script(name: str, *arguments: str) -> int:
    sys.argv = [f"jobs/{name}.py", *arguments]
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "jobs" / f"{name}.py"), run_name="__main__")
    return int(end.value.code or 0)


def test_every_script_is_a_command() -> None:
    assert set(SCRIPTS) <= set(COMMANDS)


@pytest.mark.parametrize("name", sorted({*SCRIPTS} - WITHOUT_SETTINGS))
def test_a_command_takes_the_arguments_of_its_script(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for arguments in (["--help"], ["--print-config", "--run.name=mine"], ["--no.such=1"]):
        for way, start in (("script", by_script), ("command", lambda name, *words: main([name, *words]))):
            status = start(name, *arguments)
            captured = capsys.readouterr()
            usage, _, rest = captured.out.partition("\n")
            said[way] = status, re.sub(rf"python \S*jobs/{name}.py", f"cmcgns {name}", usage), rest, captured.err
        assert said["script"] == said["command"]
        assert "".join(map(str, said["command"][1:])).strip()


def test_a_misspelt_command_names_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert capsys.readouterr().err == "error: there is no command 'pretrian'; did you mean pretrain?\n"
    assert main(["xyz"]) == 2
    assert "there are pretrain, prepare," in capsys.readouterr().err


def test_the_version_and_the_list_of_commands_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cmcgns {project['version']}\n"
    assert (main(["--help"]), main([])) == (0, 2)
    shown = capsys.readouterr().out
    assert all(shown.count(f"\n  {name} ") == 2 for name in COMMANDS)


def test_the_console_script_of_the_package_is_this_command() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["cmcgns"].partition(":")
    assert getattr(importlib.import_module(module), function) is main


def test_a_run_started_by_the_command_is_resumed_by_the_command(tmp_path: Path) -> None:
    assert main(["kmeans", f"--data.uri={tmp_path}/none", f"--run.storage={tmp_path}"]) == 2
    assert invocation() == invocation("kmeans") == ["cmcgns", "kmeans"]
    assert invocation("sweep") == ["cmcgns", "sweep"]
    sys.argv = ["jobs/evaluate.py"]
    assert invocation() == ["python", "jobs/evaluate.py"]
    assert invocation("pretrain") == ["python", "jobs/pretrain.py"]


def test_arguments_of_a_report_that_are_wrong_have_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (([], "required: run"), (["runs/x", "--uot=1"], "unrecognized arguments: --uot=1")):
        assert main(["report", *words]) == by_script("report", *words) == 2
        assert [message in line for line in capsys.readouterr().err.splitlines()] == [True, True]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("cmcgns pre", ["prepare", "pretrain"]),
        ("cmcgns pretrain --train.micro", ["--train.microbatch_size"]),
        ("cmcgns evaluate --evaluate.b", ["--evaluate.batch_size", "--evaluate.beside"]),
        ("cmcgns pretrain --config phantom-t", ["phantom-tiny"]),
        ("cmcgns export --o", ["--onnx"]),
        ("cmcgns kmeans --train.", []),
    ],
)
def test_a_shell_completes_commands_keys_and_configs(line: str, offered: list[str], tmp_path: Path) -> None:
    """As bash asks: by argcomplete's variables."""
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line,
        "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
    }  # fmt: skip
    subprocess.run([sys.executable, "-m", "cmcgns"], env=os.environ | asked, cwd=REPOSITORY, check=True, timeout=120)
    assert sorted(answer.read_text().split()) == offered
