"""An InfoNCE run that is submitted to a Ray cluster: it SUCCEEDS and starts no clustering actors.

The acceptance tests `job_submission` and `infonce` run each in full.
"""

import json
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModel

from cmcgns.run_folder import RunFolder
from tests.jobs import checkpoints, result, rows, run_here
from tests.ray_head import RayHead
from tests.submission import check_submission

SHORT = (
    "--method.name=infonce", "--train.stage1_steps=8", "--train.stage2_steps=0", "--train.warmup_steps=1",
    "--data.phantom_studies=200", "--train.log_every=1", "--train.num_workers=1", "--train.engine=torch",
    "--train.zero_stage=0", "--train.threads_per_worker=1",
)  # fmt: skip


class Titles(threading.Thread):
    """The titles of a cluster's processes, Ray actors among them, seen until ``done`` is set."""

    def __init__(self, head: RayHead) -> None:
        super().__init__(daemon=True)
        self.head, self.seen, self.done = head, set[str](), threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.3):
            self.seen |= self.head.titles()


@pytest.fixture(scope="module")
def submitted(ray_head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """Folder of the run, and the titles of its processes."""
    storage, titles = tmp_path_factory.mktemp("submitted"), Titles(ray_head)
    titles.start()
    try:
        check_submission(ray_head, storage, "--config", "jobs/configs/phantom-tiny.yaml", *SHORT)
    finally:
        titles.done.set()
        titles.join()
    return storage / "submitted", titles.seen


@pytest.mark.ray
def test_a_submitted_job_succeeds(submitted: tuple[Path, set[str]]) -> None:
    run, _ = submitted
    assert result(run)["status"] == "finished"
    assert [row["step"] for row in rows(run)] == list(range(1, 9))


@pytest.mark.ray
def test_infonce_runs_without_clustering_actors_and_without_a_decoder(submitted: tuple[Path, set[str]]) -> None:
    run, titles = submitted
    assert any("RayTrainWorker" in title for title in titles)
    assert not [title for title in titles if "BankActor" in title or "BankCoordinator" in title]
    outcome = result(run)
    assert (outcome["clustering_started_at"], outcome["centroids_version"]) == (None, None)
    [*_, last] = checkpoints(run)
    assert not (last / "clustering.safetensors").exists()
    names = load_file(last / "weights_0.safetensors").keys()
    assert not [name for name in names if name.startswith(("decoder.", "cross_attention.", "patch_projection."))]
    assert AutoModel.from_pretrained(run / "export" / "image_encoder").config.model_type == "resnet"
    assert not (run / "export" / "centroids.safetensors").exists()


@pytest.mark.ray
def test_tasks_that_need_patches_are_left_out_of_the_evaluation_of_an_infonce_run(
    submitted: tuple[Path, set[str]], local_ray: None, tmp_path: Path
) -> None:
    measured = run_here(
        tmp_path, "evaluate", f"--evaluate.run={submitted[0]}", "--evaluate.tasks=[clusters, grounding]",
        f"--run.storage={tmp_path}", "--run.name=measured",
    )  # fmt: skip
    assert measured.returncode == 0, measured.stdout + measured.stderr
    found = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert found["scores"] == []
    for task in ("clusters", "grounding"):
        assert f"{task} by pretrained: infonce attends to no patches" in found["left_out"]


def test_a_run_folder_in_a_jobs_copy_of_the_working_directory_is_known_to_pass_away() -> None:
    copy = "/somewhere/session_1/runtime_resources/working_dir_files/_ray_pkg_1"
    assert RunFolder(f"{copy}/runs", "run", resumed=False).is_temporary
    assert not RunFolder("/data/runs", "run", resumed=False).is_temporary
    assert not RunFolder("s3://bucket/runs", "run", resumed=False).is_temporary
