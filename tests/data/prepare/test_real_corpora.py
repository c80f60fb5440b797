"""Every real DICOM and 120 Open-I reports through prepare: kept or rejected as their indexes say."""

import csv
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cmcgns.data.dicom import dicom_to_grey
from cmcgns.phantom import PhantomCorpus
from tests.data.prepare.sets import prepare_here, rows

pytestmark = pytest.mark.ray

FRONTAL = ("PA", "AP", "")
LOSSLESS = ("--data.crop_borders=false", "--data.max_bad_fraction=0.5")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def bad_reasons(out: Path) -> dict[str, str]:
    """Reason by the last part of the bad path."""
    lines = (out / "bad_rows.jsonl").read_text().splitlines()
    return {Path(row["source"]).name: row["reason"] for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def films(local_ray: None, realdata: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """The index of the real DICOMs, and the set prepared from them without loss."""
    folder, index = tmp_path_factory.mktemp("dicoms"), read_csv(realdata / "dicom" / "index.csv")
    for entry in index:
        shutil.copy(realdata / "dicom" / entry["file"], folder)
    lines = [f"{entry['file']},The {number}th film is seen.,train" for number, entry in enumerate(index)]
    (folder / "pairs.csv").write_text("\n".join(["image,report,split", *lines]) + "\n")
    assert prepare_here(folder, folder / "set", *LOSSLESS, "--prepare.image_size=4096") == 0
    return index, folder / "set"


def test_every_real_dicom_is_kept_or_rejected_as_its_index_says(films: tuple[list[Any], Path], realdata: Path) -> None:
    index, out = films
    found = {row["image_id"]: cv2.imdecode(np.frombuffer(row["image"], np.uint8), 0) for row in rows(str(out))}
    bad = bad_reasons(out)
    assert len(found) + len(bad) == len(index) == 18
    for entry in index:
        name = entry["file"]
        if entry["has_pixels"] == "False":
            assert "no PixelData" in bad[name]
            continue
        assert found[name].shape == (int(entry["Rows"]), int(entry["Columns"])), name
        assert np.array_equal(found[name], dicom_to_grey((realdata / "dicom" / name).read_bytes())), name
    # pydicom fails on it (index: FAILS): 12-bit JPEG Extended, compared with the same film without loss
    extended_HW, lossless_HW = found["RG3_JPLY"].astype(int), found["RG3_JPLL"].astype(int)
    assert np.abs(extended_HW - lossless_HW).mean() < 1
    print(
        f"\n{len(found)} films kept; refused: {bad}; JPEG Extended {np.abs(extended_HW - lossless_HW).mean():.2f} off"
    )


def sections(xml: str) -> dict[str, str]:
    """The texts of a report by label, without an XML parser."""
    found = re.findall(r'<AbstractText Label="(\w+)">(.*?)</AbstractText>', xml, re.S)
    return {label: " ".join(html.unescape(text).split()) for label, text in found}


@pytest.fixture(scope="module")
def reports(local_ray: None, realdata: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    """The XML of each report, and the set prepared from them with generated films."""
    folder = tmp_path_factory.mktemp("open-i")
    texts = {path.stem: path.read_text() for path in sorted((realdata / "reports_openi").glob("*.xml"))}
    shutil.copytree(realdata / "reports_openi", folder, dirs_exist_ok=True)
    images = sorted({image for text in texts.values() for image in re.findall(r'<parentImage id="([^"]+)"', text)})
    corpus = PhantomCorpus(len(images), seed=4, height=96, width=96)
    for number, image in enumerate(images):
        cv2.imwrite(str(folder / f"{image}.png"), corpus.render(number))
    assert prepare_here(folder, folder / "set", *LOSSLESS) == 0
    return texts, folder / "set"


def test_real_open_i_reports_are_kept_with_their_words_or_rejected(
    reports: tuple[dict[str, str], Path], realdata: Path
) -> None:
    texts, out = reports
    views = {
        row["imageid"]: row["View Position"]
        for row in read_csv(realdata / "reports_openi" / "nlmcxr_dicom_metadata_subset.csv")
    }
    kept, bad = rows(str(out)), bad_reasons(out)
    by_study: dict[str, list[dict[str, Any]]] = {}
    for row in kept:
        by_study.setdefault(row["study_id"], []).append(row)
    for name, text in texts.items():
        said = sections(text)
        wanted = [label for label in ("FINDINGS", "IMPRESSION") if said.get(label)]
        images = re.findall(r'<parentImage id="([^"]+)"', text)
        if not wanted or not images:
            reason = "report names no image" if wanted else "FINDINGS and IMPRESSION are both empty"
            assert bad.pop(f"{name}.xml") == reason
            continue
        frontal = [image for image in images if views.get(image, "") in FRONTAL]
        found = by_study.pop(name, [])
        assert sorted(row["image_id"] for row in found) == sorted(frontal), name
        for row in found:
            lines = dict(line.split(": ", 1) for line in row["report"].splitlines())
            assert {label: lines[label] for label in wanted} == {label: said[label] for label in wanted}
    assert not by_study
    assert not bad
    assert len(texts) >= 60
    print(f"\n{len(texts)} reports: {len({row['study_id'] for row in kept})} kept, {len(kept)} films")
