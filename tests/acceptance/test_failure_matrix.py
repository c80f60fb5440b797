"""Each process of a run killed (kill -9) at each moment: in stage 1, in a re-clustering, as a checkpoint is uploaded, at the
stage change; a node lost with its worker at each of them, and another one added; a worker that freezes; a lost head.

The run goes on, or fails with one message and a result and is resumed; in the end every step is there once, with the losses of
the undisturbed run. A seed draws the steps and which of several processes is killed.
"""

import os
import random
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults import CLUSTERING, ENDED, REPLACED, DisturbedRun
from tests.jobs import rows
from tests.ray_head import joined_node, kill_node, running_head
from tests.survival import compare, run_undisturbed

pytestmark = pytest.mark.ray
SEED = int(os.environ.get("CMCGNS_FAILURE_SEED", "0"))
"""Another one draws other moments."""
LENGTH = 30
SETTINGS = (
    "--train.stage1_steps=22", "--train.stage2_steps=8", "--train.max_failures=-1", "--data.phantom_studies=130",
    "--train.log_every=1", "--train.checkpoint_every=4", "--clustering.refresh_every=5", "--train.warmup_steps=2",
)  # fmt: skip
FROZEN_S = 20
MOMENTS = ("stage 1", "re-clustering", "upload", "stage change")
"""In the order in which they come."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed"), *SETTINGS)


def has_come(moment: str, run: DisturbedRun, draw: random.Random) -> Callable[[], bool]:
    """Tells whether ``moment`` has come since the last fault."""
    if moment == "stage 1":
        step = draw.randint(6, 9)
        return lambda: run.step() >= step
    if moment == "re-clustering":
        return lambda: run.step() > 0 and run.is_clustering()
    if moment == "upload":
        there, name = set(run.folder.glob("checkpoint_*")), f"checkpoint_{draw.choice((16, 20)):08d}_*"
        return lambda: bool(set(run.folder.glob(name)) - there)
    return lambda: "stage 2 starts from the weights" in run.said()


@pytest.mark.parametrize("kind", [*REPLACED, *ENDED, *CLUSTERING])
def test_a_process_killed_at_each_moment_costs_no_step_and_changes_no_loss(
    kind: str, tmp_path: Path, undisturbed: Path
) -> None:
    draw = random.Random(f"{SEED} {kind}")
    run = DisturbedRun(tmp_path, *SETTINGS)
    first = 0
    for moment in MOMENTS:
        run.wait_for(moment, has_come(moment, run, draw))
        step = run.step()
        run.kill(kind, draw)
        first = first or step
        print(f"{kind} killed after step {step} ({moment})")
    run.finish(LENGTH)
    if kind in CLUSTERING:  # the rows of the lost actor are gone, so later centroids differ
        losses = [[row["loss"] for row in rows(folder)[:first]] for folder in (run.folder, undisturbed)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    else:
        compare(run.folder, undisturbed)


def test_a_node_lost_with_its_worker_at_each_moment_and_added_again_costs_no_step(
    tmp_path: Path, undisturbed: Path
) -> None:
    draw = random.Random(SEED)
    # three nodes: a worker is as large as one of those that are lost, and all else is on the head
    with running_head(cpus=2) as head, ExitStack() as nodes:
        add = lambda: nodes.enter_context(joined_node(head, cpus=3))
        alive = [add(), add()]
        run = DisturbedRun(tmp_path, *SETTINGS, "--train.cpus_per_worker=3", "--train.threads_per_worker=1", head=head)
        for moment in MOMENTS:
            run.wait_for(moment, has_come(moment, run, draw))
            step = run.step()
            run.mark()
            kill_node(alive.pop(draw.randrange(2)))
            alive.append(add())
            print(f"node killed after step {step} ({moment})")
        run.finish(LENGTH)
    compare(run.folder, undisturbed)


def test_a_frozen_worker_is_named_and_replaced_and_changes_no_loss(tmp_path: Path, undisturbed: Path) -> None:
    run = DisturbedRun(tmp_path, *SETTINGS, "--train.hang_timeout_s=15")
    run.wait_for("stage 1", lambda: run.step() >= 6)
    [*_, frozen] = run.processes("RayTrainWorker")
    frozen.suspend()
    run.finish(LENGTH)
    message = r"rank \d on node \S+ \(pid (\d+)\) hangs: it has been in step \d+ \(.*?\) for \d+ s"
    assert re.findall(message, " ".join(run.job.text().split())) == [str(frozen.pid)]
    compare(run.folder, undisturbed)


def test_a_lost_head_ends_the_run_by_name_and_one_that_is_frozen_for_a_while_does_not(
    tmp_path: Path, undisturbed: Path
) -> None:
    draw = random.Random(SEED)
    run = DisturbedRun(tmp_path, *SETTINGS)
    run.wait_for("stage 1", has_come("stage 1", run, draw))
    run.kill("gcs_server", draw)
    run.wait_for("stage 1", has_come("stage 1", run, draw))
    [head] = run.processes("gcs_server")
    head.suspend()
    time.sleep(FROZEN_S)
    head.resume()
    run.finish(LENGTH)
    compare(run.folder, undisturbed)
