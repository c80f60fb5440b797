"""Tables of the user's own whose columns have other names, as evaluation reads them."""

from pathlib import Path
from typing import Any

import pytest

from cmcgns.cli import load_config
from cmcgns.errors import UserError
from cmcgns.evaluate.config import EmbedConfig, EvaluateJobConfig
from cmcgns.evaluate.embed import open_split
from cmcgns.evaluate.encoders import EncoderSpec
from cmcgns.evaluate.run import open_sets
from cmcgns.evaluate.tasks import Evaluation
from cmcgns.library.runs import PretrainedRun
from tests.data.trees import csv_file, picture
from tests.small import small_config

COLUMNS = {"image": "File", "report": "Text", "patient": "PatientID", "split": "Part"}
FILMS = [(f"{i}.png", f"p{i // 2}", ("train", "train", "valid", "test")[i // 2 % 4], "AB"[i % 2]) for i in range(40)]
"""File, patient, split and finding; two films of each patient."""


def hospital(folder: Path, table: str, head: str = "File;PatientID;Part;Finding;Text") -> Path:
    """A folder with a table and ``films/``."""
    lines = [f"{';'.join(film)};Film of the lungs with {film[3]} seen." for film in FILMS]
    for name, *_ in FILMS:
        picture(folder / "films" / name)
    return csv_file(folder / table, head, *lines)


def run_on(uri: Path, **data: Any) -> PretrainedRun:
    config = small_config()
    settings = {"uri": str(uri), "format": "auto", "columns": COLUMNS, "films": "films", **data}
    return PretrainedRun("runs/any", config.model_copy(update={"data": config.data.model_copy(update=settings)}), None)


def evaluated(run: PretrainedRun, uri: Path, **settings: Any) -> Evaluation:
    """An evaluation of ``run`` that has opened the table at ``uri``."""
    sets = {"labelled:own": str(uri)}
    arguments = [f"--evaluate.{key}={{labelled:own: {value}}}" for key, value in settings.items()]
    found = {"column": "Finding"}
    given = load_config([f"--evaluate.sets={sets}", f"--evaluate.findings={{labelled:own: {found}}}", *arguments],
                        EvaluateJobConfig, None).evaluate  # fmt: skip
    evaluation = Evaluation(given.model_copy(update={"corpus": False}), [EncoderSpec("own", run, "run")], [], {})
    open_sets(evaluation)
    return evaluation


def check(evaluation: Evaluation) -> None:
    """The one set has every film with its patient, split and finding."""
    assert evaluation.failures == []
    images = evaluation.sets[0]
    assert images.classes == ("A", "B")
    found = [(row["image_id"], row["group"], row["split"], row["labels"]) for row in images.table.to_pylist()]
    assert found == [(*film[:3], [float(film[3] == "A"), float(film[3] == "B")]) for film in FILMS]
    assert (images.source.reader([]).read_image(images.table["path"][5].as_py()).grey_HW == 100).all()


@pytest.mark.parametrize(
    ("table", "given"), [("export.csv", "export.csv"), ("pairs.csv", ""), ("pairs.csv", "pairs.csv")]
)
def test_the_table_of_the_run_is_read_with_the_columns_and_films_of_the_run(
    tmp_path: Path, table: str, given: str
) -> None:
    uri = hospital(tmp_path, table)
    run = run_on(uri if table == "export.csv" else tmp_path)
    check(evaluated(run, tmp_path / given))
    split = open_split(run, EmbedConfig(run=run.uri, split="test"), "evaluate")  # what retrieval reads
    assert sorted(split.studies["patient_id"].to_pylist()) == sorted(film[1] for film in FILMS if film[2] == "test")


def test_another_table_is_read_with_columns_and_films_of_its_own(tmp_path: Path) -> None:
    run = run_on(hospital(tmp_path / "run", "export.csv"))
    other = hospital(tmp_path / "other", "list.csv", "Film;Person;Set;Finding;Report")
    check(evaluated(run, other, columns="{image: Film, patient: Person, split: Set}", films="films"))
    (failure,) = evaluated(run, other).failures
    assert "has no column image among its 5 columns, separated by semicolons: Film, Person, Set, Finding" in failure


def test_columns_given_for_the_table_of_the_run_replace_those_of_the_run(tmp_path: Path) -> None:
    uri = hospital(tmp_path, "export.csv")
    (images,) = evaluated(run_on(uri), uri, columns="{image: File, split: Part}").sets
    assert images.table["group"].to_pylist() == [film[0] for film in FILMS]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (
            "columns={a: {img: File}}",
            "must map image, report, patient, group, study, split, view .* img is none of them",
        ),
        ("columns={b: {image: File}}", "evaluate.columns b: no such set in evaluate.sets; given are: a"),
        ("films={b: films}", "evaluate.films b: no such set in evaluate.sets; given are: a"),
    ],
)
def test_wrong_settings_of_a_table_are_refused_before_it_is_read(setting: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_config(["--evaluate.sets={a: /nowhere}", f"--evaluate.{setting}"], EvaluateJobConfig, None)
