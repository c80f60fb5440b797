"""Sweeps that lose a node in the middle: trials of one submitted to three nodes end on the other two; where what is left has
room for one of two, they end one after the other."""

import threading
import time
from pathlib import Path

import pytest

from tests.jobs import registered, rows
from tests.ray_head import joined_node, kill_node, nodes_of_trials, running_head
from tests.submission import check_succeeded, submit
from tests.sweeping import SHORT, check_free, sweep, table, trials

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


def test_trials_that_lose_their_room_with_a_node_go_on_one_after_the_other(tmp_path: Path) -> None:
    """Two trials on two nodes, of which one has room for one: what is left could be held by halves, for ever."""
    options = (*SHORT, "--sweep.scheduler=none", "--sweep.search=random", "--sweep.trials=2", "--sweep.repeats=0")
    with running_head() as head, joined_node(head) as node:
        job, runs = sweep(tmp_path, *options, env=head.environment), tmp_path / "sweep" / "trials"
        job.wait_for(lambda: all(registered(runs / name) for name in ("0000", "0001")))
        kill_node(node)
        said = job.wait()
        assert job.process.returncode == 0, said[-3000:]
        assert "2 trials at the same time" in said
        assert "once there is capacity" in said
        assert table(tmp_path / "sweep")["status"].tolist() == ["finished"] * 2
        for name in ("0000", "0001"):
            assert [row["step"] for row in rows(runs / name)] == list(range(1, 9))
        check_free(head)
