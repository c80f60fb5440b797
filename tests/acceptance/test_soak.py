"""Half an hour of training in which a process is killed every 90 s: nothing is lost, and nothing is left behind.

``CMCGNS_SOAK_MINUTES`` makes it shorter or longer.
"""

import os
import random
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.faults import CLUSTERING, ENDED, REPLACED, DisturbedRun
from tests.jobs import checkpoints, rows
from tests.ray_head import MIB, RayHead, running_head, state
from tests.survival import check_stopped
from tests.sweeping import OF_A_TRIAL, check_free

pytestmark = pytest.mark.ray
SEED = int(os.environ.get("CMCGNS_FAILURE_SEED", "0"))
MINUTES, EVERY_S = float(os.environ.get("CMCGNS_SOAK_MINUTES", "30")), 90
SETTINGS = (
    "--train.stage1_steps=100000", "--train.stage2_steps=10", "--train.max_failures=-1", "--data.phantom_studies=400",
    "--train.log_every=1", "--train.checkpoint_every=25", "--clustering.refresh_every=10", "--train.keep_checkpoints=2",
)  # fmt: skip
SHARED_MEMORY = Path("/dev/shm")
MOST_GROWTH = 1.25
"""Of the memory from the first third of the samples to the last third."""


class Sample(NamedTuple):
    """What there is while the run trains."""

    minute: float
    fault: str
    step: int
    processes: int
    """Of the cluster, idle ones left out: Ray keeps some of them."""
    actors: int
    groups: int
    files: int
    """In folders for temporary files and in shared memory, but for Ray's logs."""
    checkpoints: int
    cluster_mib: float
    """Private memory of the cluster's processes."""
    servers_mib: float
    """Of Ray's own among them, which live as long as the cluster."""


def temporary_files(head: RayHead) -> int:
    """Entries of folders for temporary files and of shared memory, and files in Ray's folder that are no logs."""
    own = [path for path in head.folder.rglob("*") if not path.is_dir() and "logs" not in path.parts]
    return len(own) + sum(1 for folder in (Path(tempfile.gettempdir()), SHARED_MEMORY) for _ in folder.iterdir())


def sample(run: DisturbedRun, head: RayHead, minute: float, fault: str) -> Sample:
    """The cluster and the run as they are now."""
    memory, servers, processes = 0.0, 0.0, 0
    for process in head.processes():
        with suppress(psutil.Error):
            title, used = " ".join(process.cmdline()), process.memory_full_info().uss / MIB
            memory += used
            servers += 0 if title.startswith("ray::") else used
            processes += not title.startswith(("ray::IDLE", "ray::_"))
    found = state(head)
    return Sample(
        minute, fault, run.step(), processes, sum(name in OF_A_TRIAL for name, _ in found.actors),
        sum(group != "REMOVED" for group in found.groups), temporary_files(head), len(checkpoints(run.folder)), memory, servers,
    )  # fmt: skip


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_half_an_hour_of_faults_loses_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    draw = random.Random(SEED)
    with running_head() as head:
        before = temporary_files(head)
        run, begun = DisturbedRun(tmp_path, *SETTINGS, head=head), time.monotonic()
        run.wait_for("the first step", lambda: run.step() > 0)
        samples, kinds = [], [*REPLACED, *ENDED, *CLUSTERING]
        while (passed_s := time.monotonic() - begun) < 60 * MINUTES:
            if not samples or len(samples) % len(kinds) == 0:
                draw.shuffle(kinds)  # each kind comes equally often
            time.sleep(max(0.0, (len(samples) + draw.uniform(0.4, 1)) * EVERY_S - passed_s))
            kind = kinds[len(samples) % len(kinds)]
            samples.append(sample(run, head, (time.monotonic() - begun) / 60, kind))
            print(
                ", ".join(
                    f"{name} {value if isinstance(value, str) else f'{value:.4g}'}"
                    for name, value in samples[-1]._asdict().items()
                )
            )
            run.kill(kind, draw)
            run.wait_for("the next step", lambda: run.step() > 0)
        run.job.interrupt()
        last = check_stopped(run.job, run.folder)
        assert [row["step"] for row in rows(run.folder)] == list(range(1, last + 1))
        check_free(head)
        left = temporary_files(head)
    print(f"{len(samples)} faults, {last} steps, files {before} before and {left} after")
    assert len(samples) >= 60 * MINUTES / EVERY_S - 1
    third = max(1, len(samples) // 3)
    early, late = samples[:third], samples[-third:]
    for name in ("processes", "actors", "groups", "files", "checkpoints"):
        assert max(getattr(each, name) for each in late) <= max(getattr(each, name) for each in early) + 2, name
    for name in ("cluster_mib", "servers_mib"):
        grown = mean([getattr(each, name) for each in late]) / mean([getattr(each, name) for each in early])
        print(f"{name}: {grown:.3f} times what it was")
        assert grown <= MOST_GROWTH, name
    assert left <= before + 2
