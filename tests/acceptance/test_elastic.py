"""A run that begins with two workers, gets a third machine, then loses two, beside one that has two all the time."""

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.jobs import REPOSITORY, TINY, Running, result, rows
from tests.ray_head import joined_node, kill_node, running_head

pytestmark = pytest.mark.ray
LENGTH = 130
SETTINGS = (
    "--data.phantom_studies=400", "--train.stage1_steps=120", "--train.stage2_steps=10", "--train.warmup_steps=5",
    "--train.microbatch_size=4", "--train.global_batch_size=24", "--train.contrast=global_batch", "--train.log_every=1",
    "--train.checkpoint_every=10", "--train.cpus_per_worker=1", "--train.threads_per_worker=1", "--clustering.actors=1",
    "--model.dropout=0",  # each rank draws its own
    # a sentence that changes its cluster by a rounding error would change the loss by percents
    "--objective.local_negatives=films", "--objective.film_guidance=none",
    # nor would ReLUs and the statistics of a batch of four keep 1e-7 small for long
    "--model.image_encoder=vit-tiny", "--train.learning_rate=1e-4",
)  # fmt: skip
SETTLE_S = 5
"""Instead of half a minute."""
LAUNCH = (
    "import runpy, sys; import cmcgns.train.elastic as elastic; elastic.SETTLE_S = {}; "
    "sys.argv[0] = 'jobs/pretrain.py'; runpy.run_path('jobs/pretrain.py', run_name='__main__')"
)


def launch(storage: Path, name: str, environment: dict[str, str], *settings: str) -> Running:
    command = [sys.executable, "-c", LAUNCH.format(SETTLE_S), "--config", str(TINY), f"--run.storage={storage}"]
    return Running(storage, [*command, f"--run.name={name}", *SETTINGS, *settings], environment, REPOSITORY)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_of_one_to_three_workers_follows_its_machines_and_learns_what_a_run_of_two_does(
    stage: int, tmp_path: Path
) -> None:
    zero = f"--train.zero_stage={stage}"
    said = launch(tmp_path, "fixed", {}, zero, "--train.num_workers=2", "--train.cpus_per_worker=0.4").wait()
    assert result(tmp_path / "fixed")["status"] == "finished", said[-3000:]
    folder = tmp_path / "elastic"
    # four CPUs, of which two are left for workers: one reads films, and the clustering has a tenth
    with running_head(cpus=2) as head, ExitStack() as nodes:
        first, _ = (nodes.enter_context(joined_node(head, cpus=1)) for _ in range(2))
        job = launch(tmp_path, "elastic", head.environment, zero, "--train.num_workers=3", "--train.min_workers=1")
        job.wait_for(lambda: len(rows(folder)) >= 10)
        assert "training with 2 workers of 3" in job.text()
        third = nodes.enter_context(joined_node(head, cpus=1))
        job.wait_for(lambda: "there is room for 3 workers" in job.text())
        job.wait_for(lambda: "resuming after step" in job.text())
        [resumed] = [line for line in job.text().splitlines() if "resuming after step" in line]
        grown = int(resumed.split("resuming after step ")[1].split()[0])
        job.wait_for(lambda: len(rows(folder)) >= grown + 15)
        kill_node(first)
        kill_node(third)
        job.wait_for(lambda: "training with 1 workers of 3" in job.text())
        said = job.wait()
    assert result(folder)["status"] == "finished", said[-3000:]
    found, expected = rows(folder), rows(tmp_path / "fixed")
    assert [row["step"] for row in found] == list(range(1, LENGTH + 1))
    # each study of an epoch once: the same global batches
    assert [row["studies_digest"] for row in found] == [row["studies_digest"] for row in expected]
    apart = [abs(row["loss"] - wanted["loss"]) / wanted["loss"] for row, wanted in zip(found, expected, strict=True)]
    print(f"ZeRO {stage}: 2 workers, 3 from step {grown} on, then 1; losses within {max(apart):.1e} of 2 workers'")
    assert max(apart) <= 1e-4
