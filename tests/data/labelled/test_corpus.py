"""Sets from a pretraining corpus: the generated one with its ground truth, another one with its labels."""

from pathlib import Path

import numpy as np
import pytest

from cmcgns.data.labelled import check_set, labelled_set, phantom_set
from cmcgns.data.labelled.corpus import with_valid_as_test
from cmcgns.data.readers import PhantomSource, open_source
from cmcgns.data.record import StudyIndex, index_table
from cmcgns.phantom import FINDINGS, PhantomCorpus
from tests.data.labelled.trees import DARKEST, SIDE, STUDIES, shots

SOURCE = PhantomSource(STUDIES, 0, SIDE, SIDE, crop_borders=False)


def test_the_phantom_set_has_the_ground_truth_of_its_films() -> None:
    images = check_set(phantom_set(SOURCE))
    corpus = PhantomCorpus(STUDIES, 0, SIDE, SIDE)
    for i, (row, shot) in enumerate(zip(images.table.to_pylist(), shots(), strict=True)):
        assert (row["image_id"], row["group"], row["split"]) == (shot.image_id, shot.patient_id, corpus.study(i).split)
        assert row["labels"] == [shot.truth.labels[name] for name in FINDINGS]
        film = SOURCE.read_image(row["path"])
        places = images.annotations(row, film)
        found: dict[str, list[list[float]]] = {}
        for kind, corners in zip(places.kind_N, places.box_N4.tolist(), strict=True):
            found.setdefault(FINDINGS[kind], []).append(corners)
        assert (np.maximum(film.grey_HW, DARKEST) == shot.grey_HW).all()
        assert found == {name: each for name, each in shot.truth.boxes.items() if each}
        assert (places.mask_KHW == [shot.mask(name) for name in FINDINGS]).all()


def test_truth_moves_with_the_frame() -> None:
    images = phantom_set(SOURCE)
    row = next(row for row, shot in zip(images.table.to_pylist(), shots(), strict=True) if shot.boxes("effusion"))
    film = SOURCE.read_image(row["path"])
    cut = film._replace(grey_HW=film.grey_HW[20:60, 4:], frame=film.frame._replace(top=20, bottom=60, left=4))
    whole, part = images.annotations(row, film), images.annotations(row, cut)
    assert (part.mask_KHW == whole.mask_KHW[:, 20:60, 4:]).all()
    effusion = part.box_N4[part.kind_N == FINDINGS.index("effusion")]
    expected = whole.box_N4[whole.kind_N == FINDINGS.index("effusion")] - [4, 20, 4, 20]
    assert (effusion == np.clip(expected, 0, [60, 40, 60, 40])).all()


def test_opening_the_phantom_set_draws_no_film(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PhantomCorpus, "_paint", None)
    assert len(phantom_set(PhantomSource(200, 1, 256, 256)).table) == 200


def test_labels_of_a_corpus_are_known_or_not(tmp_path: Path) -> None:
    index = StudyIndex(
        table=index_table(
            [
                {
                    "study_id": f"s{i}",
                    "group": f"p{i}",
                    "split": "train",
                    "films": [{"image_id": f"{i}.{k}", "path": f"{i}/{k}.png", "view": "PA"} for k in range(1 + i % 2)],
                    "labels": labels,
                }
                for i, labels in enumerate(
                    [[("Edema", 1.0), ("Age", 0.4), ("Nodule", -1.0)], [], [("Nodule", 0.0), ("Age", 1.0)]]
                )
            ]
        ),
        filtered={"view LATERAL": 2},
    )
    (tmp_path / "pairs.csv").write_text("image,report\n")
    images = labelled_set(open_source(str(tmp_path)), index)
    assert images is not None
    assert images.classes == ("Edema", "Nodule")
    assert images.filtered == {"view LATERAL": 2}
    table = check_set(images).table
    assert table["path"].to_pylist() == ["0/0.png", "1/0.png", "2/0.png"]
    expected = [[1, np.nan], [np.nan, np.nan], [np.nan, 0]]
    np.testing.assert_array_equal(np.array(table["labels"].to_pylist(), float), expected)
    assert table["boxes"].null_count == table["masks"].null_count == 3


def test_a_corpus_without_labels_gives_no_set() -> None:
    films = [{"image_id": "a", "path": "a.png", "view": "PA"}]
    for labels in ([], [("Age", 0.5)]):
        row = {"study_id": "s", "group": "p", "split": "train", "films": films, "labels": labels}
        assert labelled_set(SOURCE, StudyIndex(index_table([row]))) is None


def test_any_generated_corpus_has_the_same_labels() -> None:
    labelled = labelled_set(SOURCE, SOURCE.index())
    assert labelled is not None
    drawn = phantom_set(SOURCE)
    order = [labelled.classes.index(name) for name in FINDINGS]
    values = np.array(labelled.table["labels"].to_pylist())
    assert (values[:, order] == np.array(drawn.table["labels"].to_pylist())).all()


def test_a_corpus_may_be_tested_on_its_validation_films() -> None:
    images = phantom_set(PhantomSource(400, 0, SIDE, SIDE))
    moved = check_set(with_valid_as_test(images, seed=0))
    assert moved.digest("test") == images.digest("valid")
    train = set(moved.split("train")["image_id"].to_pylist()) | set(moved.split("valid")["image_id"].to_pylist())
    assert train == set(images.split("train")["image_id"].to_pylist())
    assert 0.03 < len(moved.split("valid")) / len(train) < 0.2
    assert "valid is test, and a tenth of the train groups, drawn with seed 0, is valid" in moved.rule
