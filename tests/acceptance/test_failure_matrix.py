"""Each process of a run killed (kill -9), at a moment drawn by seed: in stage 1, at the stage change, as a checkpoint is
uploaded, in a re-clustering.

The run goes on, or fails with one message and a result and is resumed; in the end every step is there once, with the losses of
the undisturbed run.
"""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs import Job, check_failed, registered, result, rows
from tests.survival import LENGTH, STEPS, compare, resume, run_undisturbed

pytestmark = pytest.mark.ray
SEED = int(os.environ.get("CMCGNS_FAILURE_SEED", "0"))
"""Another one draws other moments."""
STAGE1, EVERY = 14, 4
"""Of ``tests.survival.STEPS``: steps of stage 1, and between checkpoints."""
REPLACED = ("RayTrainWorker", "SplitCoordinator")
"""Processes without which the run goes on by itself, to the same losses."""
ENDED = {"TrainController": "the controller", "RunCoordinator": "the coordinator", "driver": ""}
"""Processes with which the run ends, and who is named; it is resumed."""
CLUSTERING = ("BankActor", "BankCoordinator")
MOMENTS = ("stage 1", "stage change", "upload", "re-clustering")


def drawn() -> list[tuple[str, str]]:
    """Processes and moments: each process once, and each moment once or twice."""
    draw = random.Random(SEED)
    kinds = [*REPLACED, *ENDED, *CLUSTERING]
    moments = draw.sample(MOMENTS, 4) + draw.sample(MOMENTS, 4)
    return list(zip(kinds, moments, strict=False))


def has_come(moment: str, job: Job, folder: Path) -> Callable[[], bool]:
    """Tells whether ``moment`` of the run has come."""
    if moment == "stage 1":
        step = random.Random(SEED).randint(EVERY + 2, STAGE1 - 2)
        return lambda: len(rows(folder)) >= step
    if moment == "stage change":
        return lambda: "stage 2 starts from the weights" in job.text()
    if moment == "upload":
        return lambda: any(folder.glob(f"checkpoint_{2 * EVERY:08d}_*"))
    return lambda: len(rows(folder)) > EVERY and bool(job.processes("BankCoordinator.refit"))


def disturbed(storage: Path, kind: str, moment: str) -> tuple[Job, int]:
    """A run of which a process of ``kind`` was killed at ``moment``, and the number of steps it had written by then."""
    folder = storage / "run"
    job = Job(storage, *STEPS)
    job.wait_for(lambda: registered(folder))  # there is a checkpoint to go on from
    come, end = has_come(moment, job, folder), time.monotonic() + 300
    while not come():
        assert job.process.poll() is None, f"{moment} has not come:\n{job.text()[-2000:]}"
        assert time.monotonic() < end, f"{moment} has not come:\n{job.text()[-2000:]}"
        time.sleep(0.005)
    steps = len(rows(folder))
    if kind == "driver":
        job.kill()
    else:
        random.Random(SEED).choice(job.processes(kind)).kill()
    return job, steps


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize(("kind", "moment"), drawn(), ids=lambda each: each.replace(" ", "-"))
def test_a_killed_process_costs_no_step_and_changes_no_loss(
    kind: str, moment: str, tmp_path: Path, undisturbed: Path
) -> None:
    folder = tmp_path / "run"
    job, steps = disturbed(tmp_path, kind, moment)
    print(f"{kind} killed after step {steps} ({moment})")
    if kind in ENDED:
        if kind != "driver":
            said = check_failed(job, folder, ENDED[kind], "was killed")
            assert said.count(str(result(folder)["failure"])) == 1
            assert "--run.resume=run" in said
        job = resume(tmp_path)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    assert "Traceback" not in said
    if kind in CLUSTERING:  # the rows of the lost actor are gone, so later centroids differ
        assert [row["step"] for row in rows(folder)] == list(range(1, LENGTH + 1))
        assert result(folder)["status"] == "finished"
    else:
        compare(folder, undisturbed)
