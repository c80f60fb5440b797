"""Tables of the user's own through the job: pairs without test films, findings in one cell, and masks.

The twin of the acceptance test `openi`, on generated films in tables of the same shape.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cmcgns.cli import load_config
from cmcgns.config import Config
from tests.data.labelled.trees import BOTTOM, LEFT, RIGHT, TOP, save, shots, write
from tests.evaluate.test_embed_job import write_run
from tests.jobs import run_here

SMALL = (
    "--data.resize=40", "--data.image_size=32", "--model.image_encoder=vit-tiny", "--model.embed_dim=32",
    "--model.vocabulary_patients=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`openi/pairs.csv`, `labels.csv` and `masked.csv` with the same films."""
    folder = tmp_path_factory.mktemp("tables")
    pairs = ["image,report,patient,study,view,split,problems"]
    labels, masked = ["image,patient,split,labels"], ["image,patient,lungs_mask"]
    for i, shot in enumerate(shots()):
        image = f"images/{i}.jpg"
        save(shot.scan_HW, folder / image)
        save(shot.scan_HW, folder / "openi" / image)
        mask_HW = np.pad(shot.mask("lung_right", "lung_left"), ((TOP, BOTTOM), (LEFT, RIGHT)))
        save(np.where(mask_HW, np.uint8(255), np.uint8(0)), folder / f"masks/{i}.png")
        found = [name for name, value in shot.truth.labels.items() if value == 1]
        report = f"XXXX film {i % 9}. {'There is ' + ' and '.join(found) if found else 'No acute disease'}. Stable since XXXX."
        pairs.append(
            f"{image},{report},p{i},s{i},frontal,{'valid' if i % 3 == 2 else 'train'},{';'.join(found) or 'normal'}"
        )
        labels.append(f"{image},p{i},{('train', 'val', 'test')[i % 3]},{'|'.join(found) or 'No Finding'}")
        masked.append(f"{image},p{i},masks/{i}.png")
    write(folder / "openi" / "pairs.csv", pairs)
    write(folder / "labels.csv", labels)
    write(folder / "masked.csv", masked)
    return folder


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_run_on_pairs_without_test_films_is_evaluated_on_them_and_on_two_other_tables(
    tables: Path, tmp_path: Path
) -> None:
    config = load_config(["--config", "openi", f"--data.uri={tables}/openi", *SMALL], Config, None)
    write_run(tmp_path / "pretrained", config)
    findings = f"labelled:problems: {tables}/openi, labelled:nih: {tables}/labels.csv, masked: {tables}/masked.csv"
    done = run_here(
        tmp_path, "evaluate", "--evaluate.run=pretrained", "--run.name=e", "--evaluate.split=valid",
        "--evaluate.tasks=[retrieval, classification, segmentation]", f"--evaluate.sets={{{findings}}}",
        '--evaluate.findings={labelled:problems: {column: problems, separator: ";", commonest: 3}}',
        "--evaluate.cpus_per_worker=0.5", "--evaluate.draws=2", "--evaluate.fractions=[0.5, 1.0]",
        "--evaluate.resamples=100", "--evaluate.head_steps=5", "--evaluate.segmentation_fractions=[1.0]",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "runs" / "e" / "evaluation.json").read_text())
    scores = pd.DataFrame(found["scores"])
    retrieval = scores[scores["task"] == "retrieval"]
    assert set(retrieval["number"]) == {10}  # the films called valid
    assert set(retrieval["metric"]) == {"recall@1", "recall@5"}  # all of ten are among the first ten
    assert (found["split"], found["sets"]["labelled:problems"]["splits"]["test"]["images"]) == ("valid", 10)
    assert found["sets"]["labelled:nih"]["splits"]["test"]["images"] == 10
    probes = scores[scores["task"] == "classification"].groupby("images")["metric"].agg(set)
    classes = {name: {metric for metric in metrics if ": " in metric} for name, metrics in probes.items()}
    assert 1 <= len(classes["labelled:problems"]) <= 3 < len(classes["labelled:nih"])
    assert set(scores.loc[scores["task"] == "segmentation", "images"]) == {"masked"}


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_corpus_without_test_films_says_what_to_set(tables: Path, tmp_path: Path) -> None:
    config = load_config(["--config", "openi", f"--data.uri={tables}/openi", *SMALL], Config, None)
    write_run(tmp_path / "pretrained", config)
    done = run_here(tmp_path, "evaluate", "--evaluate.run=pretrained", "--evaluate.tasks=[retrieval]")
    assert done.returncode == 1
    assert "evaluate.split test:" in done.stdout
    assert "has no study in it, 30 in all splits; give another split" in done.stdout
