"""What was not read as it stands is counted in the summary of a prepared set, row by row."""

from pathlib import Path

import pytest

from cmcgns.data.manifest import read_manifest
from cmcgns.data.prepare.shard import ShardAccount
from cmcgns.phantom import PhantomCorpus
from tests.data.coded_films import shot
from tests.data.prepare.sets import prepare_here, rows
from tests.data.test_dicom import film, written
from tests.data.test_odd_pictures import png
from tests.data.trees import csv_file

pytestmark = pytest.mark.ray


def tree(folder: Path) -> Path:
    """Forty sound rows, and five that are read by a rule; one of them has two films."""
    corpus = PhantomCorpus(40, seed=8, height=96, width=80)
    lines = ["image;report;study;patient;split"]
    for number in range(40):
        (folder / f"{number}.png").write_bytes(png(corpus.render(number)))
        lines.append(f"{number}.png;The heart of film {number} is normal.;;;train")
    (folder / "slope.dcm").write_bytes(written(film(shot(), RescaleSlope=0, RescaleIntercept=0)))
    (folder / "left.dcm").write_bytes(written(film(shot() << 4, BitsStored=12, HighBit=15)))
    for name in ("x", "y", "z"):
        (folder / f"{name}.png").write_bytes(png(shot()))
    lines += [
        "slope.dcm;FINDINGS:_x000D_The lungs are clear.;both;p;train",
        "left.dcm;FINDINGS:_x000D_The lungs are clear.;both;p;train",
        'x.png;"FINDINGS: The lungs are clear. IMPRESSON: Normal &amp; well.";;;train',
        ".\\y.png;The lungs are clear.<br>No effusion.;;;train",
        "z.png;\\N;;;train",
    ]
    csv_file(folder / "pairs.csv", *lines)
    return folder


def test_rows_that_were_read_by_a_rule_are_counted_by_it(local_ray: None, tmp_path: Path) -> None:
    out = tmp_path / "set"
    raw = tmp_path / "raw"
    raw.mkdir()
    assert prepare_here(tree(raw), out) == 0
    manifest = read_manifest(str(out))
    assert manifest.summary["repaired"] == {
        "cells separated by semicolons": 45,
        "HTML tags and entities": 2,
        "Excel escapes (_x000D_)": 2,
        "blanks written as \\N": 1,
        "RescaleSlope 0 ignored": 1,
        "left-justified values (HighBit)": 1,
        "misspelt section headers": 1,
        "paths with backslashes or ./": 1,
    }
    assert manifest.summary["dropped"] == {"row has no report": 1}
    reports = {row["image_id"]: row["report"] for row in rows(str(out))}
    assert reports["slope.dcm"] == "FINDINGS:\nThe lungs are clear."
    assert reports[".\\y.png"] == "The lungs are clear.\nNo effusion."


def test_an_account_of_an_earlier_version_has_no_such_counts() -> None:
    account = ShardAccount([], {}, repaired={"rule": 3})
    assert ShardAccount.from_json(account.to_json()) == account
    before = account.to_json().replace(', "repaired": {"rule": 3}', "")
    assert "repaired" not in before
    assert ShardAccount.from_json(before).repaired == {}
