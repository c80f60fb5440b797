"""Tables as programs export them: every text whole, or the table refused with the number of the row."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest

from cmcgns.data.readers import open_source
from cmcgns.data.repairs import noted
from cmcgns.errors import UserError
from tests.data.trees import picture, rows

REPORTS = {
    "a.png": "The lungs are clear, no pneumothorax is seen.",
    "b.png": 'There is a "large" effusion; it is new.',
    "c.png": "FINDINGS: Clear | normal.\nIMPRESSION: No change\tsince.",
}


def read(folder: Path, content: str | bytes, encoding: str = "utf-8") -> dict[str, str]:
    """The report of each film of a pairs.csv."""
    (folder / "pairs.csv").write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    source = open_source(str(folder), format="pairs-csv")
    return {row["films"][0]["path"]: source.read_report(row) for row in rows(source.index())}


def refused(folder: Path, content: str) -> str:
    """Why the table is refused; nothing of a report is printed."""
    with pytest.raises(UserError) as error:
        read(folder, content)
    message = str(error.value)
    assert "lungs" not in message
    assert "pairs.csv" in message
    return message


def cell(text: str, sign: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(each in text for each in f'{sign}"\n') else text


def table(sign: str = ",", end: str = "\n", more: dict[str, str] | None = None, head: str = "") -> str:
    """A table of ``REPORTS`` by RFC 4180, with columns of ``more``."""
    more = more or {}
    lines = [sign.join(["image", "report", *more])]
    lines += [sign.join([name, cell(text, sign), *more.values()]) for name, text in REPORTS.items()]
    return head + end.join(lines) + end


# Separators and encodings


@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_with_any_separator_and_line_end(tmp_path: Path, sign: str, end: str) -> None:
    assert read(tmp_path, table(sign, end, {"patient": "p1", "view": "PA"})) == REPORTS
    assert read(tmp_path, table(sign, end, head=f"sep={sign}\r\n")) == REPORTS


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"]
)
def test_tables_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    text = "Épanchement à gauche, « nouveau ». Cœur normal." if encoding != "latin-1" else "Épanchement à gauche."
    assert read(tmp_path, f'image,report\na.png,"{text}"\n', encoding) == {"a.png": text}
    if encoding == "utf-16":
        assert read(tmp_path, f'image\treport\na.png\t"{text}"\n', encoding) == {"a.png": text}


def test_lines_of_two_encodings_are_each_read_in_theirs(tmp_path: Path) -> None:
    lines = [b"image,report", "a.png,Épanchement à gauche.".encode(), "b.png,It’s an œdème.".encode("cp1252")]
    assert read(tmp_path, b"\n".join(lines)) == {"a.png": "Épanchement à gauche.", "b.png": "It’s an œdème."}


# Quotes


def test_quotes_escaped_by_a_backslash_are_quotes(tmp_path: Path) -> None:
    content = (
        'image,report,patient\na.png,"The \\"large\\" lungs, clear.",p1\nfilms\\b.png,plain,p2\n'
        'c.png,"All of it is \\"quoted\\"",p3\nd.png,"ends \\\\",p4\n'
    )
    assert read(tmp_path, content) == {
        "a.png": 'The "large" lungs, clear.',
        "films\\b.png": "plain",
        "c.png": 'All of it is "quoted"',
        "d.png": "ends \\\\",
    }


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('"The "large" lungs, clear"', 'The "large" lungs, clear'),
        ('"Lungs: "clear""', 'Lungs: "clear"'),
        ('"A 5" tube, in place"', 'A 5" tube, in place'),
        ('5" tube in place', '5" tube in place'),
        ('"Clear lungs" ', "Clear lungs"),
        (' "Clear, lungs"', "Clear, lungs"),
        ('"He said ""clear"", twice"', 'He said "clear", twice'),
        ("'Clear lungs'", "'Clear lungs'"),
    ],
)
def test_quotes_that_nobody_escaped_are_part_of_the_text(tmp_path: Path, written: str, meant: str) -> None:
    content = f'image,report,patient\na.png,{written},p1\nb.png,"Other, ""quoted""",p2\n'
    assert read(tmp_path, content) == {"a.png": meant, "b.png": 'Other, "quoted"'}


@pytest.mark.parametrize(
    "content",
    [
        'image,report\na.png,"The lungs are clear\nb.png,"Effusion, new"\n',
        'image,report\na.png,"The lungs are clear\nb.png,No effusion"\nc.png,x y z\n',
        'report,image\n"The lungs are clear,a.png\nNo effusion,b.png\nNormal",c.png\n',
        'image,report,patient\na.png,"The lungs are clear,p1\nb.png,"Effusion, new",p2\n',
        'image,report\na.png,"The lungs are clear\n',
        'image;report\na.png;"The lungs; clear\nb.png;No effusion"\n',
    ],
)
def test_a_quote_that_is_not_closed_is_refused_and_swallows_no_row(tmp_path: Path, content: str) -> None:
    message = refused(tmp_path, content)
    assert "not closed" in message
    assert "line " in message


# Cells too many and too few


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            "image,report,patient\na.png,The lungs are clear, no effusion,p1\n",
            "row 1 under the header (line 2) has 4 cells",
        ),
        (
            "image,report\na.png,x\nb.png,The lungs are clear, no effusion\n",
            "row 2 under the header (line 3) has 3 cells",
        ),
        ('image,report\n"a.png","x, y"\nb.png,The lungs are clear, no effusion\n', "row 2"),
        ("image;report\na.png;The lungs; clear\n", "contains semicolons must stand in quotes"),
        ("image,report,patient\na.png,The lungs are clear.\nNo effusion.,p1\n", "row 2 under the header names no film"),
        (
            "image,patient,report\na.png,p1,The lungs are clear.\nNo effusion.\nb.png,p2,x\n",
            "row 2 under the header has 1 cells",
        ),
        (
            "image,report\na.png,The lungs are clear.\nThe heart, too\nb.png,x\nc.png,y\n",
            "row 2 under the header names no film",
        ),
    ],
)
def test_texts_without_quotes_are_refused_by_the_row(tmp_path: Path, content: str, says: str) -> None:
    assert says in refused(tmp_path, content)


def test_blank_cells_at_the_end_may_be_surplus_or_left_out(tmp_path: Path) -> None:
    content = "image,report,patient,view\na.png,Clear lungs.,,,\nb.png,Clear heart.\n\nc.png,Clear bones.,p1,,,,\n"
    assert read(tmp_path, content) == {"a.png": "Clear lungs.", "b.png": "Clear heart.", "c.png": "Clear bones."}


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    assert "column report appears twice" in refused(tmp_path, "image,report,report\na.png,The lungs,x\n")


# Ids and paths


def test_paths_of_windows_and_of_macos_find_their_films(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "épreuve.png") for form in ("NFC", "NFD"))
    for name in ("films/a.png", "films/new.png", f"films/{composed}", f"films/x{apart}", "films/last.png"):
        picture(tmp_path / name)
    written = ["films\\a.png", "films\\new.png", f"films\\{apart}", f"./films/x{composed}", "films/last.png_x000D_"]
    (tmp_path / "pairs.csv").write_text("report,image\n" + "".join(f"Clear lungs.,{name}\n" for name in written))
    source = open_source(str(tmp_path))
    for row in rows(source.index()):
        with noted() as notes:
            assert source.read_image(row["films"][0]["path"]).grey_HW.shape == (20, 30)
        assert bool(notes) == (row["films"][0]["path"] != "films/a.png")


def test_one_person_is_one_group_however_the_accents_are_written(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "José") for form in ("NFC", "NFD")]
    (tmp_path / "pairs.csv").write_text(
        "image,report,patient\n" + "".join(f"{n}.png,Clear lungs.,{name}\n" for n, name in enumerate(names))
    )
    assert len({row["group"] for row in rows(open_source(str(tmp_path)).index())}) == 1


def test_what_was_read_by_rule_is_counted(tmp_path: Path) -> None:
    content: Any = 'image;report;patient\na.png;"The \\"large\\" lungs";\\N\n' + "b.png;Épanchement;p\n"
    (tmp_path / "pairs.csv").write_bytes(content.encode("latin-1"))
    with noted() as notes:
        open_source(str(tmp_path)).index()
    assert dict(notes) == {
        "lines in Windows-1252": 1,
        "cells separated by semicolons": 2,
        'quotes escaped as \\"': 1,
        "blanks written as \\N": 1,
    }
