"""A run that loses a worker, or its driver, ends as if nothing had happened."""

import shutil
from pathlib import Path

import pytest

from tests.jobs import Job, checkpoints, registered, result, rows

pytestmark = pytest.mark.ray

STEPS = (
    "--data.phantom_studies=130", "--train.stage1_steps=14", "--train.stage2_steps=6", "--train.log_every=1",
    "--train.checkpoint_every=4", "--clustering.refresh_every=5", "--train.warmup_steps=2",
)  # fmt: skip
LENGTH, EPOCHS = 20, 5
"""About 100 training studies in global batches of 32: three or four steps an epoch."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("undisturbed")
    job = Job(storage, *STEPS, "--run.name=run")
    job.wait_for(lambda: any(row["epoch"] >= EPOCHS for row in rows(storage / "run")))
    readers = job.processes("SplitCoordinator")
    assert "finished" in job.wait()
    # the process that reads an epoch ends with it: one that is read, those begun ahead of it, one that is just ending
    assert 1 <= len(readers) <= 4
    return storage / "run"


def compare(folder: Path, undisturbed: Path, same_ranks: bool) -> None:
    """The same studies at each step, every step once, and on the same ranks the same losses."""
    found, expected = rows(folder), rows(undisturbed)
    assert [row["step"] for row in found] == list(range(1, LENGTH + 1))
    assert [row["studies_digest"] for row in found] == [row["studies_digest"] for row in expected]
    if same_ranks:
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
        assert [row["centroids_version"] for row in found] == [row["centroids_version"] for row in expected]
    assert result(folder)["status"] == "finished"


def test_a_killed_worker_is_replaced_and_the_run_ends_with_the_same_losses(tmp_path: Path, undisturbed: Path) -> None:
    job = Job(tmp_path, *STEPS, "--run.name=run")
    # Ray Train's controller counts a checkpoint a second or two after the ranks have written it
    job.wait_for(lambda: len(rows(tmp_path / "run")) >= 6 and registered(tmp_path / "run"))
    job.workers()[0].kill()
    assert "goes on after step" in job.wait()
    assert job.process.returncode == 0
    compare(tmp_path / "run", undisturbed, same_ranks=True)


def test_a_killed_run_and_one_stopped_by_ctrl_c_go_on_to_the_same_losses(tmp_path: Path, undisturbed: Path) -> None:
    job = Job(tmp_path, *STEPS, "--run.name=run")
    job.wait_for(lambda: len(rows(tmp_path / "run")) >= 6 and registered(tmp_path / "run"))
    job.kill()
    job = Job(tmp_path, "--run.resume=run", config=None)
    job.wait_for(lambda: len(rows(tmp_path / "run")) >= 10)
    job.interrupt()
    text = job.wait()
    assert job.process.returncode == 130, text
    assert "--run.resume=run" in text
    assert "Traceback" not in text
    stopped = result(tmp_path / "run")
    assert stopped["status"] == "stopped"
    assert checkpoints(tmp_path / "run")[-1].name.startswith(f"checkpoint_{stopped['steps']:08d}_")
    job = Job(tmp_path, "--run.resume=run", config=None)
    job.wait()
    compare(tmp_path / "run", undisturbed, same_ranks=True)


def test_a_killed_run_resumed_on_another_number_of_workers_sees_the_same_studies(
    tmp_path: Path, undisturbed: Path
) -> None:
    job = Job(tmp_path, *STEPS, "--run.name=run")
    job.wait_for(lambda: len(rows(tmp_path / "run")) >= 6 and registered(tmp_path / "run"))
    job.kill()
    job = Job(tmp_path, "--run.resume=run", "--train.num_workers=1", "--train.zero_stage=3", config=None)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    compare(tmp_path / "run", undisturbed, same_ranks=False)


def test_a_run_that_was_lost_after_its_last_step_has_only_its_export_to_do_again(
    tmp_path: Path, undisturbed: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "export")
    job = Job(tmp_path, "--run.resume=run", config=None)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    compare(tmp_path / "run", undisturbed, same_ranks=True)
    found, expected = result(tmp_path / "run")["metrics"], result(undisturbed)["metrics"]
    assert found["loss_global"] == pytest.approx(expected["loss_global"], rel=1e-5)
    assert (tmp_path / "run" / "export" / "heads.safetensors").exists()


def test_a_second_ctrl_c_gives_up_at_once_and_names_the_command_all_the_same(tmp_path: Path) -> None:
    job = Job(tmp_path, *STEPS, "--run.name=run")
    job.wait_for(lambda: registered(tmp_path / "run"))
    job.interrupt()
    job.wait_for(lambda: "stopping after this step" in job.text())
    job.interrupt()
    said = job.wait()
    assert job.process.returncode == 130, said
    assert "Traceback" not in said
    assert "--run.resume=run" in said
    stopped = result(tmp_path / "run")
    assert stopped["status"] == "stopped"
    assert (Path(stopped["checkpoint"]) / "progress.json").exists()
