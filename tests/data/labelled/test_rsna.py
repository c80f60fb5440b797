"""``rsna``: boxes over several rows of one patient, and masks that are those boxes."""

from pathlib import Path

import numpy as np
import pytest

from cmcgns.data.labelled import open_set
from cmcgns.data.labelled.base import Folder, filled
from cmcgns.data.labelled.located import rsna_films
from cmcgns.phantom.writers import write_dicom
from tests.data.labelled.trees import SIDE, Shot, rows, save, seen, shots, splits, write

HEADER = "patientId,x,y,width,height,Target"


def tree(folder: Path, ending: str = "png") -> None:
    """One film per patient; consolidation and effusion count as pneumonia, so that many have several boxes."""
    lines = [HEADER]
    for shot in shots():
        corners = pneumonia(shot, scan=True)
        lines += [f"{shot.image_id},{','.join(map(str, each))},1" for each in corners] or [f"{shot.image_id},,,,,0"]
        path = folder / f"stage_2_train_images/{shot.image_id}.{ending}"
        if ending == "dcm":
            path.parent.mkdir(parents=True, exist_ok=True)
            write_dicom(
                path,
                shot.scan_HW.astype(np.uint16) * 16,
                photometric="MONOCHROME2",
                window=(2048, 4096),
                patient_id=shot.patient_id,
                study_id="1",
                image_id=shot.image_id,
                view="AP",
            )
        else:
            save(shot.scan_HW, path)
    write(folder / "stage_2_train_labels.csv", lines)


def pneumonia(shot: Shot, scan: bool = False) -> list[list[float]]:
    boxes = shot.scan_xywh if scan else shot.boxes
    return boxes("consolidation") + boxes("effusion")


@pytest.mark.parametrize("ending", ["dcm", "png"])
def test_boxes_and_their_filled_masks_are_read(tmp_path: Path, ending: str) -> None:
    tree(tmp_path, ending)
    images = open_set("rsna", str(tmp_path))
    assert list(rows(images)) == [shot.image_id for shot in shots()]
    assert max(len(pneumonia(shot)) for shot in shots()) > 1
    for row, shot in zip(rows(images).values(), shots(), strict=True):
        truth = pneumonia(shot)
        boxes, mask_KHW = seen(images, row)
        assert [corners for _, corners in boxes] == truth
        assert row["labels"] == [float(bool(truth))]
        assert row["boxes"] is not None
        assert row["masks"] is not None
        assert (mask_KHW == filled(np.array(truth).reshape(-1, 4), SIDE, SIDE)).all()


def test_a_dicom_is_preferred_to_an_image_with_the_same_name(tmp_path: Path) -> None:
    tree(tmp_path, "dcm")
    tree(tmp_path, "png")
    assert all(row["path"].endswith(".dcm") for row in rows(open_set("rsna", str(tmp_path))).values())


def test_patients_are_drawn_by_seed(tmp_path: Path) -> None:
    tree(tmp_path)
    first, second = (splits(open_set("rsna", str(tmp_path), seed=seed)) for seed in (0, 1))
    assert first != second
    assert first == splits(open_set("rsna", str(tmp_path)))


def test_real_label_files_are_read(realdata: Path) -> None:
    folder = Folder("rsna", str(realdata / "labels"), frozenset())
    films = rsna_films(folder, "rsna_stage_2_train_labels_sample.csv").set_index("image_id")
    assert films.loc["0004cfab-14fd-4e49-80ba-63a80b6bddd6", "boxes"] == []
    two = films.loc["00436515-870c-4b36-a041-de91049b9ab4", "boxes"]
    assert [(each["x0"], each["y0"], each["x1"], each["y1"]) for each in two] == [
        (264, 152, 264 + 213, 152 + 379),
        (562, 152, 562 + 256, 152 + 453),
    ]
