"""A sweep submitted to a cluster of three nodes: trials spread over them, one node is killed in the middle, the sweep ends."""

import threading
import time
from pathlib import Path

import pytest

from tests.ray_head import joined_node, kill_node, nodes_of_trials, running_head
from tests.submission import check_succeeded, submit
from tests.sweeping import SHORT, check_free, table, trials

pytestmark = pytest.mark.ray

TRIALS = 5


def test_a_sweep_on_three_nodes_survives_the_loss_of_one(tmp_path: Path) -> None:
    with running_head() as head, joined_node(head) as second, joined_node(head):
        options = (f"--run.storage={tmp_path}", "--run.name=sweep", "--config=jobs/configs/phantom-tiny.yaml")
        search = (f"--sweep.trials={TRIALS}", "--sweep.search=random", "--sweep.scheduler=none", "--sweep.repeats=0")
        found: list[set[str]] = []

        def disturb() -> None:
            end = time.monotonic() + 600
            while time.monotonic() < end and not any(trial["values"] for trial in trials(tmp_path / "sweep")):
                time.sleep(1)
            found.append(nodes_of_trials(head))
            kill_node(second)

        thread = threading.Thread(target=disturb)
        thread.start()
        done = submit(head, *options, *SHORT, "--train.validate_every=2", *search, timeout_s=1200, job="jobs/sweep.py")
        thread.join()
        check_succeeded(head, done)
        print(f"\ntrials ran on {len(found[0])} nodes\n" + "\n".join(done.output.splitlines()[-20:]))
        assert len(found[0]) >= 2
        assert table(tmp_path / "sweep")["status"].tolist() == ["finished"] * TRIALS
        assert check_free(head).nodes == 2
