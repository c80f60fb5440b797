"""Sends the main job to a Ray cluster with ``ray job submit``, as the README says."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.jobs import REPOSITORY
from tests.ray_head import RayHead

KEPT_AT_HOME = (".venv", ".cache", ".git", "runs", ".mypy_cache", ".ruff_cache")
"""Folders of a checkout that must not travel."""


@dataclass(frozen=True)
class Submission:
    """A submitted job that has come to its end."""

    status: int
    output: str
    job: str
    """Ray's name for it."""


README_LINES = ("ray start --head --num-cpus=2", "ray job submit --working-dir . -- python jobs/pretrain.py")
"""What the README tells its readers to type; the tests add ports of their own and the address of their cluster."""


def submit(
    head: RayHead,
    *arguments: str,
    variables: dict[str, str] | None = None,
    timeout_s: float = 900,
    job: str = "jobs/pretrain.py",
) -> Submission:
    """``ray job submit --working-dir . -- python JOB ARGUMENTS``, followed to its end.

    ``variables`` travel as the job's own environment, as credentials do.
    """
    environment = ["--runtime-env-json", json.dumps({"env_vars": variables})] if variables else []
    ray = str(Path(sys.executable).with_name("ray"))
    done = subprocess.run(
        [
            ray, "job", "submit", "--address", head.dashboard, "--working-dir", ".", *environment,
            "--", "python", job, *arguments,
        ],
        cwd=REPOSITORY,
        env={**os.environ, **head.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )  # fmt: skip
    name = next((word.strip("'") for word in done.stdout.split() if word.startswith("'raysubmit_")), "")
    return Submission(done.returncode, done.stdout, name)


def job_state(head: RayHead, job: str) -> str:
    """What the cluster itself says of a job: SUCCEEDED, FAILED, ..."""
    from ray.job_submission import JobSubmissionClient

    headers = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    return str(JobSubmissionClient(head.dashboard, headers=headers).get_job_status(job).value)


def travelled(head: RayHead) -> list[Path]:
    """Everything of the checkout that lies in the cluster's copy, relative to it."""
    copies = list((head.folder / "r" / "session_latest" / "runtime_resources").glob("working_dir_files/_ray_pkg_*"))
    folder = max((path for path in copies if path.is_dir()), key=lambda path: path.stat().st_mtime)
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def check_succeeded(head: RayHead, done: Submission) -> None:
    """Assert that the cluster and the one who submitted agree: SUCCEEDED."""
    assert done.status == 0, done.output[-3000:]
    assert job_state(head, done.job) == "SUCCEEDED"


def check_submission(head: RayHead, storage: Path, *arguments: str) -> None:
    """Assert that a submitted job SUCCEEDED, left its run in ``storage`` and took only the sources along."""
    (REPOSITORY / ".cache").mkdir(exist_ok=True)
    (REPOSITORY / ".cache" / "kept").touch()  # Ray sends empty folders, whatever .rayignore says
    readme = (REPOSITORY / "README.md").read_text()
    assert all(line in readme for line in README_LINES)
    variables = {"AWS_ACCESS_KEY_ID": "anything", "TOKENIZERS_PARALLELISM": "false"}
    done = submit(head, *arguments, f"--run.storage={storage}", "--run.name=submitted", variables=variables)
    check_succeeded(head, done)
    assert "is deleted with the cluster" not in done.output
    assert '"status": "finished"' in (storage / "submitted" / "result.json").read_text()
    files = travelled(head)
    assert Path("jobs/pretrain.py") in files
    assert not {path.parts[0] for path in files} & set(KEPT_AT_HOME)
    print(f"\n{done.job}: SUCCEEDED; {len(files)} files and folders travelled")
