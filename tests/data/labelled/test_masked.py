"""``masked``: a user's mask files and COCO boxes, locally and on S3."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmcgns.data.labelled import ImageSet, open_set
from cmcgns.errors import BadRow
from cmcgns.storage import s3
from tests.data.labelled.trees import BOTTOM, LEFT, RIGHT, TOP, Shot, rows, save, seen, shots, splits, write
from tests.s3 import S3Server

KINDS = {1: "cardiomegaly", 3: "effusion"}


def tree(folder: Path, table: str = "pairs.csv", zoom: int = 1) -> None:
    """Masks of the lungs of 2 films in 3 and of the heart of every other; boxes of the films after the tenth."""
    lines = ["image,report,patient,group,split,lung_mask,heart_mask,some_boxes"]
    coco: dict[str, list[dict[str, object]]] = {
        "images": [], "annotations": [], "categories": [{"id": k, "name": name} for k, name in KINDS.items()]
    }  # fmt: skip
    for i, shot in enumerate(shots()):
        image = f"films/{shot.image_id}.png"
        save(shot.scan_HW, folder / image)
        lung = f"masks/lung {i}.png" if i % 3 else ""
        heart = f"masks/heart {i}.png" if i % 2 else ""
        for path, names in ((lung, ("lung_right", "lung_left")), (heart, ("heart",))):
            if path:
                mask_HW = np.pad(shot.mask(*names), ((TOP, BOTTOM), (LEFT, RIGHT)))
                save(
                    np.where(np.kron(mask_HW, np.ones((zoom, zoom), bool)), np.uint8(255), np.uint8(127)), folder / path
                )
        split = ("train", "Validation", "", "test")[i % 4] if i < 20 else ""
        boxes = "boxes.json" if i > 5 else ""
        lines.append(f'{image},"Clear, {i}",{shot.patient_id},,{split},{lung},{heart},{boxes}')
        if i >= 10:
            coco["images"].append({"id": 7 * i, "file_name": f"elsewhere/{shot.image_id}.png"})
            coco["annotations"] += [
                {"image_id": 7 * i, "category_id": k, "bbox": each}
                for k, name in KINDS.items()
                for each in shot.scan_xywh(name)
            ]
    write(folder / table, lines)
    (folder / "boxes.json").write_text(json.dumps(coco))


def has_boxes(i: int) -> bool:
    return i >= 10


def in_set(i: int) -> bool:
    return has_boxes(i) or i % 6 != 0


def check_truth(images: ImageSet, chosen: tuple[tuple[int, Shot], ...]) -> None:
    """Check every mask and box of these films."""
    found = rows(images)
    for i, shot in chosen:
        row = found[f"films/{shot.image_id}.png"]
        boxes, mask_KHW = seen(images, row)
        lung_HW = shot.mask("lung_right", "lung_left") & bool(i % 3)
        assert (mask_KHW == [lung_HW, shot.mask("heart") & bool(i % 2)]).all()
        assert (row["masks"] is None) == (i % 6 == 0)
        assert (row["boxes"] is None) == (not has_boxes(i))
        assert boxes == [(name, each) for name in KINDS.values() for each in shot.boxes(name) if has_boxes(i)]


@pytest.mark.parametrize("zoom", [1, 3], ids=["of the scan's size", "three times as large"])
def test_masks_and_boxes_are_read(tmp_path: Path, zoom: int) -> None:
    tree(tmp_path, zoom=zoom)
    images = pickle.loads(pickle.dumps(open_set("masked", str(tmp_path))))
    assert images.mask_classes == ("lung", "heart")
    assert images.box_classes == tuple(KINDS.values())
    chosen = tuple((i, shot) for i, shot in enumerate(shots()) if in_set(i))
    assert len(chosen) == len(images.table)
    assert images.filtered == {"neither mask nor boxes": 30 - len(chosen)}
    check_truth(images, chosen)


def test_the_folder_and_its_csv_are_the_same_set(tmp_path: Path) -> None:
    tree(tmp_path)
    images = open_set("masked", str(tmp_path))
    (tmp_path / "pairs.csv").rename(tmp_path / "mine.csv")
    assert open_set("masked", str(tmp_path / "mine.csv")) == images


def test_given_splits_are_kept_but_no_group_is_divided(tmp_path: Path) -> None:
    tree(tmp_path)
    images = open_set("masked", str(tmp_path), seed=1)
    splits(images)
    assert "with several splits take the split" in images.rule
    first: dict[str, str] = {}
    for i, shot in enumerate(shots()[:20]):
        written = ("train", "valid", "", "test")[i % 4]
        if in_set(i) and written:
            first.setdefault(shot.patient_id, written)
    for row in rows(images).values():
        assert row["split"] == first.get(row["group"], row["split"])


def test_an_image_in_several_pairs_is_one_row(tmp_path: Path) -> None:
    tree(tmp_path)
    images = open_set("masked", str(tmp_path))
    lines = (tmp_path / "pairs.csv").read_text().splitlines()
    write(tmp_path / "pairs.csv", [*lines, lines[-1].replace("Clear", "Another report")])
    assert open_set("masked", str(tmp_path)).table == images.table


def test_a_broken_mask_file_is_named(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "masks/lung 1.png").write_bytes(b"none")
    images = open_set("masked", str(tmp_path))
    row = rows(images)[f"films/{shots()[1].image_id}.png"]
    with pytest.raises(BadRow, match=r"mask masks/lung 1\.png"):
        seen(images, row)


@pytest.mark.s3
def test_a_set_on_s3_is_the_local_one(tmp_path: Path, s3_server: S3Server) -> None:
    for kept in (s3._arrow_filesystem, s3._client, s3._profile_value):
        kept.cache_clear()
    tree(tmp_path)
    bucket = s3_server.make_bucket("downstream")
    s3_server.upload(tmp_path, f"{bucket}/lungs")
    images = open_set("masked", f"{bucket}/lungs")
    assert images.table == open_set("masked", str(tmp_path)).table
    check_truth(images, tuple(enumerate(shots()))[11:14])


def test_real_lungs_have_masks_and_boxes(realdata: Path) -> None:
    images = open_set("masked", str(realdata))
    assert images.mask_classes == ("lung",)
    assert images.box_classes == ("Right Lung", "Left Lung")
    masked = [row for row in rows(images).values() if row["masks"]]
    assert len(masked) == len(list((realdata / "masks").iterdir()))
    for row in masked[:3]:
        film = images.source.reader([]).read_image(row["path"])
        places = images.annotations(row, film)
        share = places.mask_KHW.mean()
        assert 0.1 < share < 0.7
        # boxes and masks of the lungs nearly agree
        x0, y0, x1, y1 = np.concatenate([places.box_N4[:, :2].min(0), places.box_N4[:, 2:].max(0)]).round().astype(int)
        assert places.mask_KHW[0, y0:y1, x0:x1].sum() > 0.9 * places.mask_KHW.sum()
        assert Image.open(realdata / row["path"]).size[0] >= film.frame.right
