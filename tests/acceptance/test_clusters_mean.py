"""Clusters mean something: they follow finding, side and negation in sentences that training has never seen.

What counts is the lead over another study's film. An agreement by itself also counts what a sentence says without its film: with
the sentence loss it was 0.22, of which another film kept 0.14.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from cmcgns.evaluate.tasks.clusters import fit_clusters
from cmcgns.library.runs import open_run
from cmcgns.methods.base import load_method
from tests.evaluate.clusters import Agreement, agreement, attended, texts_of_test_split
from tests.evaluate.false_negatives import of_run
from tests.jobs import REPOSITORY, Job

pytestmark = pytest.mark.ray

LEAD = 0.1
TRAINED, RANDOM, OTHER_FILM = "the trained model", "a random model", "another study's film"
STEPS = 1600
"""Longer than the default run: see README.md here for what that reaches."""


def run_job(name: str, *settings: str) -> str:
    done = subprocess.run(
        [sys.executable, f"jobs/{name}.py", *settings], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    tmp_path = tmp_path_factory.mktemp("run")
    job = Job(tmp_path, "--run.name=pretrained", f"--train.stage1_steps={STEPS}", config=None)
    output = job.wait(timeout_s=1500)
    assert job.process.returncode == 0, output[-3000:]
    return tmp_path / "pretrained"


@pytest.fixture(scope="module")
def found(pretrained: Path) -> dict[str, Agreement]:
    """Agreement of the trained model's clusters, and of the controls', with what sentences never seen say."""
    tmp_path = pretrained.parent
    store = f"--run.storage={tmp_path}"
    run_job("embed", f"--embed.run={tmp_path}/pretrained", store, "--run.name=embedded")
    shown = run_job(
        "kmeans", f"--data.uri={tmp_path}/embedded/sentences", "--data.text_column=text", store, "--run.name=clusters",
        "--clustering.num_clusters=64", "--clustering.cpus_per_actor=0.5",
    )  # fmt: skip
    print(shown)
    sentences = parquet.read_table(tmp_path / "embedded" / "sentences").to_pandas().set_index("id")
    assigned = parquet.read_table(tmp_path / "clusters" / "assignments").to_pandas().set_index("id")
    texts = sentences["text"].loc[assigned.index].tolist()

    run = open_run("embed.run", str(tmp_path / "pretrained"))
    texts_in_order = texts_of_test_split(run)
    assert sorted(texts_in_order) == sorted(texts)
    torch.manual_seed(1)
    fresh = load_method(run.config).build_model(run.tokenizer.vocabulary_size)
    features = {
        OTHER_FILM: attended(run, run.load_model(), shift=7),
        RANDOM: attended(run, fresh),
    }
    clusters = run.config.objective.num_clusters
    found = {TRAINED: agreement(assigned["centroid"].to_numpy(), texts)}
    found |= {name: agreement(fit_clusters(rows_ND, clusters), texts_in_order) for name, rows_ND in features.items()}
    for name, each in found.items():
        print(
            f"{name:22} AMI {each.mutual_information:.3f}, purity {each.purity:.3f}, by chance {each.purity_by_chance:.3f}"
        )
    return found


def test_clusters_follow_what_unseen_sentences_say(found: dict[str, Agreement]) -> None:
    assert found[TRAINED].purity > found[TRAINED].purity_by_chance


@pytest.mark.parametrize("control", [RANDOM, OTHER_FILM])
def test_clusters_follow_it_more_than_those_of_a_control(found: dict[str, Agreement], control: str) -> None:
    assert found[TRAINED].mutual_information >= found[control].mutual_information + LEAD


def test_most_films_that_clusters_leave_out_show_what_the_sentence_says(pretrained: Path) -> None:
    left_out = of_run(open_run("embed.run", str(pretrained)))
    print(f"left out: precision {left_out.precision:.3f} beside {left_out.base_rate:.3f}, recall {left_out.recall:.3f}")
    assert left_out.precision > max(0.5, left_out.base_rate)
