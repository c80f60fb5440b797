"""Every command of a job in the pages is one that the job takes: its settings exist and their values are valid."""

import re
import shlex
from pathlib import Path

import pytest

from cmcgns.commands import main
from tests.jobs import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "cluster" / "README.md"]
JOB = re.compile(r"^(?:ray job submit .*-- )?(?:python \S*jobs/(\w+)\.py|cmcgns (\w+)) (.*)$")
MISSING = ("does not exist", "no such file", "is missing", "no run", "cannot be read")
"""What is said of the folders in examples; anything else is a fault of the example."""


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Job and arguments of each command with arguments; `[...]` stands for whatever the reader adds."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        if language not in ("", "bash", "sh"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            match = JOB.match(line.strip())
            if match and "[--" not in line:
                found.append((match[1] or match[2], shlex.split(match[3], comments=True)))
    return found


ALL = {f"{page.name}: {job} {' '.join(words)}": (job, words) for page in PAGES for job, words in commands(page)}


@pytest.mark.parametrize(
    "command", [name for name, (job, _) in ALL.items() if job not in ("report", "export", "doctor")]
)
def test_the_settings_of_a_command_exist_and_are_valid(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").symlink_to(REPOSITORY / "jobs")
    (tmp_path / "FILE.yaml").write_text("extends: phantom\n")
    job, words = ALL[command]
    words = [word.replace("s3://BUCKET", "/bucket").replace("s3://bucket", "/bucket") for word in words]
    status = main([job, *words, "--print-config"])
    said = capsys.readouterr().err
    assert status == 0 or any(words in said for words in MISSING), said


def test_the_pages_have_commands() -> None:
    assert len(ALL) > 30
    assert {job for job, _ in ALL.values()} >= {
        "pretrain",
        "prepare",
        "sweep",
        "evaluate",
        "embed",
        "kmeans",
        "search",
        "report",
    }
