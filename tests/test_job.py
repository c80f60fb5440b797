"""What every job does around its work: signals, the command that goes on, names of folders, addresses, the terminal."""

import io
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cmcgns.cli import load_config
from cmcgns.cluster.session import _check_address
from cmcgns.config import Config, RunConfig
from cmcgns.errors import UserError
from cmcgns.job import Job
from cmcgns.run_folder import RunFolder, find_folder
from cmcgns.signals import sigterm_as_ctrl_c
from cmcgns.storage.s3 import custom_endpoint
from cmcgns.terminal import console
from cmcgns.train.run import PretrainJob
from tests.small import small_config


class Stopped(Job):
    """A job that was stopped, in a folder of the user's."""

    script = "pretrain"

    def __init__(self, storage: str) -> None:
        self.folder = RunFolder(storage, "run", resumed=False)

    def plan(self, cpus: float) -> dict[str, str]:
        return {}

    def run(self, terminal: Console) -> dict[str, Any]:
        return {}

    def summary(self, result: dict[str, Any]) -> dict[str, str]:
        return {}


def test_sigterm_is_ctrl_c_and_is_remembered() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_as_ctrl_c() as outer, sigterm_as_ctrl_c() as inner:
        assert inner is outer  # an ablation and its pretraining
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert outer.received
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_ends_a_job_that_a_script_has_started_without_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("storage", ["/data/runs", "/data/runs [v2]", "/x[/y]", "/it's"])
def test_the_command_that_resumes_can_be_pasted_whatever_the_folder_is_called(storage: str) -> None:
    job = Stopped(storage)
    assert shlex.split(job.resume_command()) == [
        "python", "jobs/pretrain.py", f"--run.storage={storage}", "--run.resume=run",
    ]  # fmt: skip
    text = io.StringIO()
    job.report(Console(file=text, width=200), {"status": "stopped"})
    assert job.resume_command() in text.getvalue()


class Training(PretrainJob):
    """A pretraining run in a folder of the user's."""

    def __init__(self, storage: Path) -> None:
        self.folder, self.config = RunFolder(str(storage), "run", resumed=False), small_config()


def last_words(job: Job, **result: Any) -> str:
    text = io.StringIO()
    job.report(Console(file=text, width=200, soft_wrap=True), {"status": "failed", "failure": "why"} | result)
    return text.getvalue()


@pytest.mark.parametrize("result", [{}, {"checkpoint": None}])
def test_a_run_that_failed_before_its_first_checkpoint_is_not_told_to_resume_from_it(
    tmp_path: Path, result: dict[str, None]
) -> None:
    job = Training(tmp_path)
    (tmp_path / "run").mkdir()
    assert "there is nothing to resume: start the same command again" in last_words(job, **result)
    (tmp_path / "run" / "config.yaml").touch()  # the run has been written
    words = last_words(job, **result)
    assert "no step is saved yet" in words
    assert job.resume_command() in words
    assert "last checkpoint" not in words


def test_a_run_that_failed_after_a_checkpoint_is_told_how_to_resume(tmp_path: Path) -> None:
    job, checkpoint = Training(tmp_path), tmp_path / "run" / "checkpoint_00000001_of_2_0a1b2c"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").touch()
    assert f"resume from the last checkpoint with: {job.resume_command()}" in last_words(job)
    assert f"resume from the last checkpoint with: {job.resume_command()}" in last_words(job, checkpoint="somewhere")


def test_a_finished_run_names_a_command_for_each_use_of_it() -> None:
    job = Training(Path("/data/my runs"))
    commands = job.next_commands()
    assert shlex.split(commands["report"]) == ["cmcgns", "report", "/data/my runs/run"]
    assert shlex.split(commands["search"])[-2:] == ["--search.run=/data/my runs/run", "--search.index=indexes/run"]
    assert commands["in Python"] == "cmcgns.load('/data/my runs/run')"
    job.config = small_config(data__reports=False, method__name="images100m", train__stage2_steps=0)
    assert "search" not in job.next_commands()


def test_the_name_of_a_finished_run_is_said_to_have_finished_and_not_to_resume(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.yaml").touch()
    run = RunConfig(name="own", storage=str(tmp_path))
    with pytest.raises(UserError, match=r"run\.name own is taken .* or resume that run with --run\.resume=own"):
        find_folder(run, "pretrain")
    (folder / "result.json").write_text('{"status": "finished"}')
    with pytest.raises(UserError) as error:
        find_folder(run, "pretrain")
    assert "by a run that has finished; choose another" in str(error.value)
    assert str(error.value).endswith(f"cmcgns report {folder}")
    assert "resume" not in str(error.value)


def test_a_renamed_run_goes_on_under_its_new_name(tmp_path: Path) -> None:
    settings = small_config().model_dump(mode="json") | {"run": {"name": "before", "storage": "elsewhere"}}
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed" / "config.yaml").write_text(yaml.safe_dump(settings))
    config = load_config([f"--run.storage={tmp_path}", "--run.resume=renamed"], Config, None)
    folder = find_folder(config.run, "pretrain")
    assert (folder.name, folder.storage, folder.resumed) == ("renamed", str(tmp_path), True)


@pytest.mark.parametrize("uri", ["gs://bucket/runs", "s3a://bucket/runs", "S3://bucket/runs"])
def test_a_folder_for_runs_with_an_unknown_scheme_is_refused(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"run.storage .*: unknown scheme; give a local folder or s3://BUCKET/FOLDER"):
        find_folder(RunConfig(storage=uri), "pretrain")
    assert not list(tmp_path.iterdir())


def test_a_folder_for_runs_may_be_a_file_uri(tmp_path: Path) -> None:
    assert find_folder(RunConfig(storage=f"file://{tmp_path}"), "pretrain").storage == str(tmp_path)


@pytest.mark.parametrize(
    ("endpoint", "fix"),
    [
        ("minio.local:9000", "AWS_ENDPOINT_URL minio.local:9000: write http:// or https:// before the host"),
        ("http://my_minio:9000", "a host name has no underscores"),
    ],
)
def test_an_endpoint_that_cannot_work_is_refused_at_once(
    endpoint: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match=fix):
        custom_endpoint()


def test_the_address_of_the_dashboard_is_not_taken_for_that_of_the_cluster() -> None:
    with pytest.raises(UserError, match=r"that is the dashboard, .*takes RAY_ADDRESS=head:6379"):
        _check_address("http://head:8265")


def test_a_terminal_without_a_character_shows_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    console().print("Ödem 3 mm", highlight=False)
    sys.stdout.flush()
    assert written.getvalue() == b"?dem 3 mm\n"


def test_a_notebooks_backend_does_not_stop_a_job() -> None:
    code = "import os, cmcgns.plotting; print(os.environ['MPLBACKEND'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MPLBACKEND": "module://not_installed.backend"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "module://not_installed.backend\n"), done.stderr
