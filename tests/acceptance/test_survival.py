"""Killed workers, killed drivers, other numbers of workers, Ctrl-C once and twice, a loss after the last step."""

import shutil
from pathlib import Path

import pytest

from tests.jobs import result, rows
from tests.survival import check_stopped, compare, resume, run_undisturbed, start

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed"))


def test_a_killed_worker_is_replaced_and_the_run_ends_with_the_same_losses(tmp_path: Path, undisturbed: Path) -> None:
    job = start(tmp_path, steps=6)
    job.workers()[0].kill()
    assert "resuming after step" in job.wait()
    assert job.process.returncode == 0
    compare(tmp_path / "run", undisturbed)


def test_a_killed_run_and_one_stopped_by_ctrl_c_go_on_to_the_same_losses(tmp_path: Path, undisturbed: Path) -> None:
    start(tmp_path, steps=6).kill()
    job = resume(tmp_path)
    job.wait_for(lambda: len(rows(tmp_path / "run")) >= 10)
    job.interrupt()
    check_stopped(job, tmp_path / "run")
    resume(tmp_path).wait()
    compare(tmp_path / "run", undisturbed)


def test_a_killed_run_resumed_on_another_number_of_workers_sees_the_same_studies(
    tmp_path: Path, undisturbed: Path
) -> None:
    start(tmp_path, steps=6).kill()
    job = resume(tmp_path, "--train.num_workers=1", "--train.zero_stage=3")
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    compare(tmp_path / "run", undisturbed, same_ranks_until=0)


def test_a_run_that_was_lost_after_its_last_step_has_only_its_export_to_do_again(
    tmp_path: Path, undisturbed: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "export")
    job = resume(tmp_path)
    said = job.wait()
    assert job.process.returncode == 0, said[-3000:]
    compare(tmp_path / "run", undisturbed)
    found, expected = result(tmp_path / "run")["metrics"], result(undisturbed)["metrics"]
    assert found["loss_global"] == pytest.approx(expected["loss_global"], rel=1e-5)
    assert (tmp_path / "run" / "export" / "heads.safetensors").exists()


def test_a_second_ctrl_c_gives_up_at_once_and_names_the_command_all_the_same(tmp_path: Path) -> None:
    job = start(tmp_path, steps=1)
    job.interrupt()
    job.wait_for(lambda: "stopping after this step" in job.text())
    job.interrupt()
    check_stopped(job, tmp_path / "run")
