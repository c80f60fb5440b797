"""A run that is disturbed, beside one that is not."""

from pathlib import Path
from typing import Any

from tests.jobs import REPOSITORY, Job, registered, result, rows

STEPS = (
    "--run.name=run", "--data.phantom_studies=130", "--train.stage1_steps=14", "--train.stage2_steps=6",
    "--train.log_every=1", "--train.checkpoint_every=4", "--clustering.refresh_every=5", "--train.warmup_steps=2",
)  # fmt: skip
LENGTH, EPOCHS = 20, 5
"""About 100 training studies in global batches of 32: three or four steps an epoch."""


def run_undisturbed(storage: Path, *settings: str) -> Path:
    """The folder of a run that nothing has disturbed."""
    job = Job(storage, *(("--run.name=run", *settings) if settings else STEPS))
    job.wait_for(lambda: any(row["epoch"] >= EPOCHS for row in rows(storage / "run")))
    readers = job.processes("SplitCoordinator")
    assert "finished" in job.wait()
    # the process that reads an epoch ends with it: one that is read, those begun ahead of it, one that is just ending
    assert 1 <= len(readers) <= 4
    return storage / "run"


def start(storage: Path, steps: int, *more: str, cwd: Path = REPOSITORY) -> Job:
    """A run that has done ``steps`` steps and can go on from a checkpoint."""
    job = Job(storage, *STEPS, *more, cwd=cwd)
    # Ray Train's controller counts a checkpoint a second or two after the ranks have written it
    job.wait_for(lambda: len(rows(storage / "run")) >= steps and registered(storage / "run"))
    return job


def resume(storage: Path, *changes: str) -> Job:
    """The run again, from its last checkpoint."""
    return Job(storage, "--run.resume=run", *changes, config=None)


def compare(folder: Path, undisturbed: Path, same_ranks_until: int | None = None) -> None:
    """The same studies at each step, every step once, and on the same ranks the same losses and centroids."""
    found, expected = rows(folder), rows(undisturbed)
    assert [row["step"] for row in found] == list(range(1, len(expected) + 1))
    assert [row["studies_digest"] for row in found] == [row["studies_digest"] for row in expected]
    same_steps(found[:same_ranks_until], expected[:same_ranks_until])
    assert result(folder)["status"] == "finished"


def same_steps(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same studies, losses and centroids at each step."""
    for row, wanted in zip(found, expected, strict=True):
        assert (row["step"], row["studies_digest"]) == (wanted["step"], wanted["studies_digest"])
        assert abs(row["loss"] - wanted["loss"]) <= 1e-5 * wanted["loss"], row["step"]
        assert row["centroids_version"] == wanted["centroids_version"], row["step"]


def check_stopped(job: Job, folder: Path, status: int = 130) -> int:
    """A run that Ctrl-C or SIGTERM has ended: its status, one line how to go on, a checkpoint; its number of steps."""
    said = job.wait()
    assert job.process.returncode == status, said
    assert "--run.resume=run" in said
    assert "Traceback" not in said
    stopped = result(folder)
    assert stopped["status"] == "stopped"
    assert (Path(stopped["checkpoint"]) / "progress.json").exists()
    return int(stopped["steps"])
