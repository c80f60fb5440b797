"""Runs `jobs/sweep.py` as a user does, and reads its files."""

import json
import time
from pathlib import Path
from typing import Any

import pandas as pd

from tests.jobs import TINY, Job
from tests.ray_head import ClusterState, RayHead, state

SHORT = (
    "--data.phantom_studies=130", "--train.stage1_steps=6", "--train.stage2_steps=2", "--train.warmup_steps=1",
    "--train.log_every=1", "--train.checkpoint_every=2",
)  # fmt: skip
FREE_S = 20


def sweep(storage: Path, *arguments: str, config: Path | None = TINY, env: dict[str, str] | None = None) -> Job:
    """A sweep called `sweep` under ``storage``; without ``config`` it is resumed."""
    name = "--run.name=sweep" if config else "--sweep.resume=sweep"
    return Job(storage, name, *arguments, config=config, env=env, job="jobs/sweep.py")


def trials(folder: Path) -> list[dict[str, Any]]:
    """Trials in the ledger of a sweep; empty if there is no ledger yet."""
    path = folder / "sweep.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["trials"] if path.exists() else []
    return found


def table(folder: Path) -> pd.DataFrame:
    """trials.csv by trial."""
    return pd.read_csv(folder / "trials.csv").set_index("trial").sort_index()


def check_free(head: RayHead) -> ClusterState:
    """Assert that within ``FREE_S`` every CPU of the cluster is free, and no actor of a trial is left."""
    end = time.monotonic() + FREE_S
    while True:
        found = state(head)
        left = [name for name, _ in found.actors if name in OF_A_TRIAL]
        held = [group for group in found.groups if group != "REMOVED"]
        if found.free.get("CPU") == found.all["CPU"] and not left and not held:
            return found
        assert time.monotonic() < end, (found, left, held)


OF_A_TRIAL = (
    "SweepTrial", "ResourceTrainable", "TrialRunner", "RunCoordinator", "BankActor", "BankCoordinator",
    "TrainController", "RayTrainWorker",
    "SplitCoordinator", "PlacementGroupCleaner", "SynchronizationActor", "SweepMonitor",
)  # fmt: skip
