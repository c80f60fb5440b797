"""A hospital's own table beside a folder of films: how it is mapped, and what a message says about it."""

from pathlib import Path
from typing import Any

import pytest

from cmcgns.cli import load_config
from cmcgns.config import Config, DataConfig
from cmcgns.data.image import Target
from cmcgns.data.prepare.config import PrepareJobConfig
from cmcgns.data.readers import PairsSource, Splits, open_source, open_splits
from cmcgns.errors import UserError
from tests.data.trees import csv_file, index_of, picture, rows

COLUMNS = {"image": "File", "report": "reporttext", "patient": "PatientID", "study": "Accession"}
CELLS = (
    ("A1", "p1", "1.png", "The lungs are clear."),
    ("A1", "p1", "2.png", "The lungs are clear."),
    ("A2", "p2", "3.png", "Effusion on the left."),
)


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """A folder with export.csv and films/, as a hospital's export."""
    csv_file(tmp_path / "export.csv", "Accession;PatientID;File;ReportText", *map(";".join, CELLS))
    for _, _, film, _ in CELLS:
        picture(tmp_path / "films" / film, 50)
    return tmp_path


def opened(uri: Path, **settings: Any) -> Splits:
    """The corpus as a job opens it."""
    return open_splits("data.uri", DataConfig(uri=str(uri), **settings), Target(40, "longer"), 256)


def refusal(uri: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        opened(uri, **settings)
    return str(error.value)


def test_mapped_columns_are_read_as_a_table_with_our_names(hospital: Path) -> None:
    expected = index_of(hospital / "ours", "study,patient,image,report", *map(",".join, CELLS))
    mapped = open_source(str(hospital / "export.csv"), columns=COLUMNS)
    assert rows(mapped.index()) == rows(expected)
    assert [(row["study_id"], row["patient_id"], len(row["films"])) for row in rows(expected)] == [
        ("A1", "p1", 2),
        ("A2", "p2", 1),
    ]


@pytest.mark.parametrize("absolute", [True, False])
def test_films_lie_in_a_folder_of_their_own(hospital: Path, absolute: bool) -> None:
    films = str(hospital / "films") if absolute else "films"
    splits = opened(hospital / "export.csv", columns=COLUMNS, films=films)
    assert splits.bad_rows == []
    assert (splits.source.reader(["3.png"]).read_image("3.png").grey_HW == 50).all()


@pytest.mark.parametrize(
    ("uri", "films", "expected"),
    [
        ("s3://bucket/in/export.csv", "films", "s3://bucket/in/films"),
        ("s3://bucket/in", "s3://other/films", "s3://other/films"),
        ("/in/export.csv", "s3://other/films", "s3://other/films"),
        ("/in/export.csv", "~/films", str(Path.home() / "films")),
    ],
)
def test_the_folder_of_the_films_may_be_in_another_storage(uri: str, films: str, expected: str) -> None:
    source = PairsSource.at(uri, ("PA",), 0, films=films)
    assert (source.uri, source.folder) == (expected, uri.removesuffix("/export.csv"))


def test_a_mapped_column_takes_the_place_of_one_that_has_our_name(tmp_path: Path) -> None:
    index = index_of(tmp_path, "report,text,image", "see text,Clear lungs.,a.png", columns={"report": "text"})
    assert rows(index)[0]["report"] == "Clear lungs."


def test_the_command_line_maps_columns_in_training_and_in_prepare() -> None:
    words = ["--data.columns={image: File, report: ReportText}", "--data.films=films"]
    for data in (
        load_config(words, Config, Path("own_pairs")).data,
        load_config([*words, "--prepare.out=set"], PrepareJobConfig, None).data,
    ):
        assert (data.columns, data.films) == ({"image": "File", "report": "ReportText"}, "films")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{img: File}", "must map image, report, patient, group, study, split, view .* img is none of them"),
        ("{image: 7}", "must give the name of one column for each"),
        ("File", "must be a map such as"),
    ],
)
def test_a_wrong_map_is_refused_before_anything_is_read(given: str, says: str) -> None:
    with pytest.raises(UserError, match=rf"data\.columns = .* {says}"):
        load_config([f"--data.columns={given}"], Config, None)


def test_columns_that_the_table_lacks_are_one_message(hospital: Path) -> None:
    message = refusal(hospital / "export.csv", columns=COLUMNS | {"view": "View", "split": "Part"})
    assert "no column View (for view) and no column Part (for split), which data.columns names" in message
    assert "4 columns, separated by semicolons: Accession, PatientID, File, ReportText" in message


def test_only_a_pairs_table_takes_columns_and_films() -> None:
    for settings in ({"columns": {"image": "File"}}, {"films": "films"}):
        with pytest.raises(UserError, match=rf"data\.{next(iter(settings))} is for a pairs-csv"):
            open_source("phantom", **settings)


def test_a_table_with_other_columns_shows_them_and_how_to_map_them(hospital: Path) -> None:
    message = refusal(hospital / "export.csv")
    assert "no column image and no column report among its 4 columns, separated by semicolons" in message
    assert "Accession, PatientID, File, ReportText." in message
    assert "--data.columns='{image: NAME, report: NAME}'" in message
    csv_file(hospital / "wide.csv", ",".join(f"column {'x' * number}" for number in range(1, 31)), "a" + "," * 29)
    assert " and 10 more. " in refusal(hospital / "wide.csv")


@pytest.mark.parametrize(
    "first",
    ["one.png,clear lungs", "IM0001,clear lungs", "films/one,clear lungs", "DOE^JOHN,clear lungs", "john,No effusion."],
)
def test_a_first_line_with_the_data_of_a_patient_is_not_printed(tmp_path: Path, first: str) -> None:
    message = refusal(csv_file(tmp_path / "headless.csv", first, "two.png,Effusion."))
    assert "its first line is not printed, because it looks like data" in message
    assert not any(cell in message.removeprefix(f"data.uri {tmp_path}") for cell in first.split(","))


@pytest.mark.parametrize("format", ["pairs-csv", "auto"])
def test_a_folder_without_pairs_csv_names_the_tables_that_it_has(hospital: Path, format: str) -> None:
    assert f"The folder has export.csv: give the table itself, as {hospital}/export.csv" in refusal(
        hospital, format=format
    )


def test_a_folder_without_any_table_is_not_said_to_be_missing(tmp_path: Path) -> None:
    message = refusal(tmp_path, format="pairs-csv")
    assert message.startswith(f"data.uri {tmp_path} has no pairs.csv. Write one there")


def test_a_missing_folder_is_named_without_a_file_that_nobody_gave(tmp_path: Path) -> None:
    assert refusal(tmp_path / "hospitl", format="pairs-csv") == (
        f"data.uri {tmp_path}/hospitl does not exist; give an existing file or folder"
    )


def test_a_table_whose_films_are_elsewhere_is_refused_with_the_path_that_was_tried(hospital: Path) -> None:
    message = refusal(hospital / "export.csv", columns=COLUMNS)
    assert f"none of its first 3 films is there, the first was tried as {hospital}/1.png" in message
    assert "set data.films=films" in message
    message = refusal(hospital / "export.csv", columns=COLUMNS, films="flms")
    assert f"tried as {hospital}/flms/1.png; copy the films there, or give their folder as data.films" in message


def test_one_film_of_the_first_is_enough(hospital: Path) -> None:
    for name in ("1.png", "2.png"):
        (hospital / "films" / name).unlink()
    assert sum(map(len, opened(hospital / "export.csv", columns=COLUMNS, films="films").studies.values())) == 2


@pytest.mark.parametrize("times", [1, 30])  # the second is too long for a file name
def test_a_report_in_the_column_of_images_is_not_printed(tmp_path: Path, times: int) -> None:
    message = refusal(csv_file(tmp_path / "pairs.csv", "image,report", f"{'The heart is large. ' * times},a.png"))
    assert "none of its first 1 films is there" in message
    assert "heart" not in message
