"""A sweep of eight trials on the tiny phantom: in time, bad trials stopped, everything free at the end, a winner that is none
by luck, and a best.yaml that gives its number again."""

import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray
import yaml

from cmcgns.cli import validate
from cmcgns.config import Config
from cmcgns.data.tokenizer import load_tokenizer
from cmcgns.evaluate.tasks.retrieval import model_retrieval
from cmcgns.library.runs import PretrainedRun
from cmcgns.measures import MEAN_RECALL, measure
from cmcgns.methods.base import load_method
from cmcgns.train.checkpoint import load_progress, load_shard, load_weights
from tests.jobs import Job, checkpoints, result
from tests.ray_head import RayHead
from tests.sweeping import check_free, sweep, table, trials

pytestmark = pytest.mark.ray

MINUTES = 20
PARTS = ("process", "opening", "pool", "workers", "ending")


@pytest.fixture(scope="module")
def swept(ray_head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep's folder, once it has ended with status 0 in under 20 minutes."""
    storage = tmp_path_factory.mktemp("sweeps")
    began = time.monotonic()
    job = sweep(storage, "--sweep.trials=8", env=ray_head.environment)
    said = job.wait(timeout_s=2 * MINUTES * 60)
    minutes = (time.monotonic() - began) / 60
    print("\n" + "\n".join(said.splitlines()[-9:]), f"\n{minutes:.1f} minutes")
    assert job.process.returncode == 0, said[-3000:]
    assert minutes < MINUTES
    return storage / "sweep"


def test_asha_stops_two_trials_and_everything_is_free_at_the_end(swept: Path, ray_head: RayHead) -> None:
    found = table(swept)
    first_runs = found[found["repeats"].isna()]
    assert len(first_runs) == 8
    assert (first_runs["status"] == "stopped").sum() >= 2
    assert {f"{MEAN_RECALL}@15", f"{MEAN_RECALL}@30"} <= set(found.columns)
    check_free(ray_head)


def test_the_winner_beats_the_median_trial_on_the_test_split_and_its_spread_is_told(swept: Path) -> None:
    answer = result(swept)
    best = answer["finalists"][0]
    assert len(best["seeds"]) == 3
    assert best["spread"] is not None
    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR")
    try:
        scores = {trial["number"]: on_test(swept / "trials" / f"{trial['number']:04d}") for trial in trials(swept)[:8]}
    finally:
        ray.shutdown()
    assert scores[answer["best"]] == pytest.approx(best[f"test_{MEAN_RECALL}"], abs=1e-6)
    print(f"\non test: winner {scores[answer['best']]:.4f}, median {median(scores.values()):.4f} of {scores}")
    print(f"mean and spread of {len(best['seeds'])} seeds on valid: {best['mean']:.4f}, {best['spread']:.4f}")
    assert scores[answer["best"]] > median(scores.values())


def on_test(folder: Path) -> float:
    """A trial's metric on the test split, by the weights of its last checkpoint."""
    config = validate(yaml.safe_load((folder / "config.yaml").read_text()), Config)
    tokenizer = load_tokenizer(
        str(folder / "tokenizer"), str(folder / "tokenizer"), config.data.max_tokens, config.data.max_sentences
    )
    model = load_method(config).build_model(tokenizer.vocabulary_size)
    checkpoint = str(checkpoints(folder)[-1])
    load_weights(model, load_shard(checkpoint, "weights", load_progress(checkpoint)))
    scores: dict[str, Any] = model_retrieval(model.eval(), PretrainedRun(str(folder), config, tokenizer), "test")
    return measure(MEAN_RECALL, scores)


def test_best_yaml_alone_gives_the_metric_of_its_trial(swept: Path, tmp_path: Path) -> None:
    Job(tmp_path, "--run.name=alone", config=swept / "best.yaml").wait()
    alone = measure(MEAN_RECALL, result(tmp_path / "alone")["metrics"])
    wanted = result(swept)["finalists"][0][f"valid_{MEAN_RECALL}"]
    print(f"\n{MEAN_RECALL} alone {alone:.6f}, as a trial {wanted:.6f}")
    assert alone == pytest.approx(wanted, abs=1e-5)


def test_what_a_trial_costs_beyond_its_training_is_told_part_by_part(swept: Path) -> None:
    found = table(swept)
    finished = found[found["status"] == "finished"]
    costs: pd.DataFrame = finished[[f"seconds_{part}" for part in PARTS]]
    beyond = costs.sum(axis=1)
    training, total = finished["seconds_training"].sum(), result(swept)["seconds"]
    print("\n" + costs.describe().loc[["min", "50%", "max"]].to_string())
    print(f"beyond training {beyond.median():.1f} s a trial (median), {beyond.max():.1f} s at most")
    print(f"training {training:.0f} of {finished['seconds'].sum():.0f} s of finished trials; the sweep {total:.0f} s")
    assert np.isfinite(beyond).all()
