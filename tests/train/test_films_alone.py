"""Films without reports through the whole job: pretraining, its export, and what needs reports is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModel

from cmcgns.data.prepare.check import check_set
from cmcgns.data.readers import open_source
from cmcgns.errors import UserError
from tests.data.prepare.sets import prepare_here
from tests.data.prepare.sets import rows as prepared_rows
from tests.data.trees import csv_file
from tests.data.trees import rows as index_rows
from tests.jobs import REPOSITORY, result, rows, run_here

FILMS = 60
ALONE = (
    "--config", str(REPOSITORY / "jobs" / "configs" / "phantom-tiny.yaml"), "--method.name=images100m",
    "--objective.prototypes=8", "--objective.queue=24", "--train.num_workers=1", "--train.engine=torch", "--train.zero_stage=0",
    "--train.microbatch_size=8", "--train.global_batch_size=8", "--train.stage1_steps=6", "--train.stage2_steps=0",
    "--train.warmup_steps=1", "--data.validation_studies=6",
)  # fmt: skip


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labels.csv as of a set for classification: films, patients, splits and findings, and no report."""
    folder, random = tmp_path_factory.mktemp("films"), np.random.default_rng(0)
    lines = []
    for number in range(FILMS):
        name = f"images/{number:03}.png"
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (80, 90), np.uint8)).save(folder / name)
        seen = ("1", "0", "-1", "")[number % 4]
        lines.append(f"{name},p{number // 2},{'val' if number >= FILMS - 8 else 'train'},No Finding,{seen}")
    csv_file(folder / "labels.csv", "image,patient,split,labels,Edema", *lines)
    return folder


def test_a_table_without_reports_is_read_only_if_the_settings_say_so(films: Path) -> None:
    index = open_source(str(films / "labels.csv"), reports=False).index()
    assert len(index.table) == FILMS
    assert not index.bad_rows
    first = index_rows(index)[0]
    assert (first["study_id"], first["patient_id"], first["split"], first["report"]) == (
        "images/000.png",
        "p0",
        "train",
        None,
    )
    with pytest.raises(UserError, match=r"has no column report .* for films without reports set data\.reports=false"):
        open_source(str(films / "labels.csv")).index()
    with pytest.raises(UserError, match="has no column image among"):
        open_source(str(csv_file(films / "none.csv", "film,patient", "a.png,p")), reports=False).index()


@pytest.mark.ray
def test_films_without_reports_are_prepared_with_their_labels(local_ray: None, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", str(tmp_path / "set")
    lines = [f"{number}.png,p{number},{number % 2},No effusion." for number in range(12)]
    for number in range(12):
        film_HW = np.random.default_rng(number).integers(0, 256, (40, 50), np.uint8)
        raw.mkdir(exist_ok=True)
        Image.fromarray(film_HW).save(raw / f"{number}.png")
    csv_file(raw / "pairs.csv", "image,patient,effusion,report", *lines)
    alone = ("--data.reports=false", "--prepare.image_size=40")
    assert prepare_here(raw, out, *alone) == 0
    kept = prepared_rows(out)
    assert {row["image_id"]: dict(row["labels"])["effusion"] for row in kept} == {f"{n}.png": n % 2 for n in range(12)}
    assert {(row["report"], tuple(row["sentences"])) for row in kept} == {("", ())}
    assert check_set(out) == 0
    assert not (tmp_path / "set" / "findings.jsonl").exists()  # no report is in two splits
    assert len(open_source(out, "parquet", reports=False).index().table) == 12
    with pytest.raises(UserError, match=r"was prepared without reports; for films alone set data\.reports=false"):
        open_source(out, "parquet").index()
    with pytest.raises(UserError, match="is a complete set with reports False, not True"):
        prepare_here(raw, out, "--prepare.image_size=40")
    with pytest.raises(UserError, match=r"scrub_reports true: data\.reports false reads no reports"):
        prepare_here(raw, out, *alone, "--prepare.scrub_reports=true")


@pytest.mark.ray
def test_films_without_reports_pretrain_an_encoder(local_ray: None, films: Path, tmp_path: Path) -> None:
    prepared = str(tmp_path / "set")
    assert prepare_here(films / "labels.csv", prepared, "--data.reports=false") == 0
    uri = f"--data.uri={prepared}"
    refused = run_here(tmp_path, "pretrain", *ALONE[:2], uri, "--data.reports=false")
    assert refused.returncode == 2
    assert "data.reports false: method.name cm-cgns learns from reports" in refused.stderr + refused.stdout
    by_labels = ("--data.reports=false", "--objective.supervision=labels")
    refused = run_here(tmp_path, "pretrain", *ALONE, uri, *by_labels, "--objective.classes=[Edema, Oedema]")
    assert refused.returncode == 2
    said = " ".join((refused.stderr + refused.stdout).split())
    assert f"no training study of data.uri {prepared} has the label Oedema; its labels are: Edema" in said
    done = run_here(tmp_path, "pretrain", *ALONE, uri, *by_labels, "--objective.classes=[Edema]", "--run.name=alone")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "runs" / "alone"
    assert result(run)["status"] == "finished"
    assert result(run)["bad_rows"] == 0
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    assert all(0 < row["loss_supervised"] < 5 for row in rows(run))
    [validation] = rows(run, "val")
    assert validation["studies"] == 6
    assert not [name for name in validation if "recall" in name]
    AutoModel.from_pretrained(run / "export" / "image_encoder")
    assert "no reports" in done.stdout
    assert "loss" in json.dumps(result(run)["metrics"])
    sentences = run_here(tmp_path, "embed", f"--embed.run={run}", "--run.name=sentences")
    assert sentences.returncode == 2
    assert "data.reports false: there are no sentences" in sentences.stderr + sentences.stdout
