"""Features and films by Ray Data: the same as for films read one by one, and each film is read once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from cmcgns.config import MethodConfig
from cmcgns.data.batch import normalise
from cmcgns.data.image import resize_image
from cmcgns.data.labelled import ImageSet, open_set, phantom_set
from cmcgns.data.labelled.base import image_table
from cmcgns.data.readers import FileSource, PhantomSource
from cmcgns.data.tokenizer import train_tokenizer
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.features import features_uri, make_features, read_features
from cmcgns.evaluate.films import load_films, make_films, resize_boxes, resize_masks
from tests.data.labelled.trees import save, shots, write
from tests.evaluate.heads import small_spec

SIZE, RESIZE = 32, 40
SETTINGS = EvaluateConfig(batch_size=7, cpus_per_worker=0.5)
PHANTOM = phantom_set(PhantomSource(60, 1, 56, 48))
ENCODERS = [small_spec(name, SIZE, RESIZE) for name in ("resnet-tiny", "vit-tiny")]


def masked(folder: Path, number: int = 12) -> ImageSet:
    """Films with mask files; the third film and the fourth mask are broken."""
    lines = ["image,device_mask"]
    for i, shot in enumerate(shots()[:number]):
        save(shot.grey_HW, folder / f"{i}.png")
        save(shot.mask("effusion", "cardiomegaly", "device").astype(np.uint8) * 255, folder / f"{i}_mask.png")
        lines.append(f"{i}.png,{i}_mask.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])
    (folder / "3_mask.png").write_bytes(b"")
    write(folder / "pairs.csv", lines)
    images = open_set("masked", str(folder))
    return replace(images, classes=("device",), table=images.table)


def boxed(folder: Path, number: int = 5) -> ImageSet:
    """Films with boxes only, like in object detection sets."""
    rows = []
    for i, shot in enumerate(shots()[:number]):
        save(shot.grey_HW, folder / f"{i}.png")
        boxes = [dict(zip(("kind", "x0", "y0", "x1", "y1"), (0, *box), strict=True)) for box in shot.boxes("device")]
        rows.append({"image_id": str(i), "path": f"{i}.png", "group": str(i), "split": "train", "boxes": boxes})
    return ImageSet("boxed", FileSource(str(folder), "boxed"), image_table(rows), "as given", box_classes=("device",))


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_features_are_those_of_films_read_one_by_one(tmp_path: Path) -> None:
    uris, bad = make_features(ENCODERS, PHANTOM, str(tmp_path), SETTINGS)
    assert bad == {}
    for spec, uri in zip(ENCODERS, uris, strict=True):
        encoder, found = spec.load(), read_features(uri)
        assert found.image_ids == PHANTOM.table["image_id"].to_pylist()
        assert found.shared_ND is not None
        assert found.pooled_NC.shape == (60, 192)
        for row, path in enumerate(PHANTOM.table["path"].to_pylist()):
            square_RR = resize_image(PHANTOM.source.reader([]).read_image(path).grey_HW, RESIZE)
            seen_HW = torch.from_numpy(square_RR[4:-4, 4:-4].copy())
            with torch.inference_mode():
                pooled_1C, shared_1D = encoder(normalise(seen_HW[None, None]))
            assert shared_1D is not None
            assert np.abs(found.pooled_NC[row] - pooled_1C[0].numpy()).max() < 1e-4
            assert np.abs(found.shared_ND[row] - shared_1D[0].numpy()).max() < 1e-4
            assert np.linalg.norm(found.shared_ND[row]) == pytest.approx(1, abs=1e-5)
        assert found.pooled_NC.std(0).max() > 1e-3  # films differ


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_an_unreadable_film_is_named_and_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    images, cache = masked(tmp_path / "set"), str(tmp_path / "cache")
    uris, bad = make_features(ENCODERS[:1], images, cache, SETTINGS)
    assert bad == {"2.png": "film file is truncated or broken (OSError)"}
    found = read_features(uris[0])
    assert found.image_ids == [f"{i}.png" for i in range(12) if i != 2]
    places, kept = found.of(["9.png", "2.png", "0.png"])
    assert (places.tolist(), kept.image_ids) == ([0, 2], ["9.png", "0.png"])
    assert (kept.pooled_NC == found.pooled_NC[[8, 0]]).all()
    for film in (tmp_path / "set").glob("*.png"):
        film.unlink()
    assert make_features(ENCODERS[:1], images, cache, SETTINGS) == (uris, bad)  # reported again
    # another encoder needs the films, which have been deleted
    others, gone = make_features(ENCODERS, images, cache, SETTINGS)
    assert others[0] == uris[0]
    assert gone == {f"{i}.png": "film file is missing" for i in range(12)}
    assert len(read_features(others[1]).image_ids) == 0
    assert (read_features(uris[0]).pooled_NC == found.pooled_NC).all()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_masks_and_boxes_lie_on_the_square_where_the_set_says(tmp_path: Path) -> None:
    some = replace(PHANTOM, table=PHANTOM.table.slice(0, 20))
    uri, bad = make_films(some, SIZE, 0.5, str(tmp_path))
    assert bad == {}
    found = load_films(uri, some, SIZE)
    assert found.image_ids == some.table["image_id"].to_pylist()
    for i, row in enumerate(some.table.to_pylist()):
        film = some.source.reader([]).read_image(row["path"])
        places = some.annotations(row, film)
        assert (found.film_NRR[i] == resize_image(film.grey_HW, SIZE)).all()
        assert (found.mask_NKRR[i] == resize_masks(places.mask_KHW, SIZE)).all()
        assert (found.boxes[i] == resize_boxes(places.box_N4, film.grey_HW.shape, SIZE)).all()
        assert (found.kinds[i] == places.kind_N).all()
    assert found.mask_NKRR.any(axis=(0, 2, 3)).sum() >= 5
    again = found.take([3, 3, 0])
    assert again.image_ids == [found.image_ids[i] for i in (3, 3, 0)]
    assert (again.mask_NKRR == found.mask_NKRR[[3, 3, 0]]).all()
    assert [each.tolist() for each in again.boxes] == [found.boxes[i].tolist() for i in (3, 3, 0)]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_sets_with_masks_or_boxes_alone_are_read_and_broken_masks_named(tmp_path: Path) -> None:
    images = masked(tmp_path / "masks")
    uri, bad = make_films(images, SIZE, 0.5, str(tmp_path))
    assert bad == {
        "2.png": "film file is truncated or broken (OSError)",
        "3.png": "mask 3_mask.png: film file is empty (0 bytes)",
    }
    found = load_films(uri, images, SIZE)
    assert found.image_ids == [f"{i}.png" for i in range(12) if i not in (2, 3)]
    assert found.mask_NKRR.shape == (10, 1, SIZE, SIZE)
    assert found.mask_NKRR.any(axis=(1, 2, 3)).sum() > 0
    assert make_films(images, SIZE, 0.5, str(tmp_path)) == (uri, bad)

    images = boxed(tmp_path / "boxes")
    found = load_films(make_films(images, SIZE, 0.5, str(tmp_path))[0], images, SIZE)
    assert found.mask_NKRR.shape == (5, 0, SIZE, SIZE)
    assert [len(each) for each in found.boxes] == [len(shot.boxes("device")) for shot in shots()[:5]]
    assert sum(map(len, found.boxes)) > 0


def test_features_are_taken_for_their_own_alone() -> None:
    """Another encoder, set or preprocessing has separate features, even with the same ids."""
    source = PHANTOM.source
    sets = [PHANTOM, *(replace(PHANTOM, source=replace(source, **{key: value})) for key, value in (
        ("height", 64), ("width", 56), ("crop_borders", False)
    ))]  # fmt: skip
    specs = [
        *ENCODERS,
        small_spec("resnet-tiny", SIZE, RESIZE, seed=1),
        small_spec("resnet-tiny", SIZE, 48),
        small_spec("resnet-tiny", 64, 72),
    ]
    uris = {features_uri("cache", spec, images) for spec in specs for images in sets}
    assert len(uris) == len(specs) * len(sets)
    assert features_uri("cache", small_spec("resnet-tiny", SIZE, RESIZE), phantom_set(source)) in uris


def test_an_untrained_encoder_is_known_by_all_that_its_weights_are_drawn_after() -> None:
    """The same seed and image encoder with a text encoder of another vocabulary: other heads, other features."""
    spec = small_spec("resnet-tiny", SIZE, RESIZE)
    tokenizer = train_tokenizer([("p", "the lungs are clear"), ("p", "the heart is enlarged")], 64, 64, 8)
    other = replace(spec, run=replace(spec.run, vocabulary=tokenizer))
    film = torch.linspace(-1, 1, SIZE * SIZE).reshape(1, 1, SIZE, SIZE)
    with torch.inference_mode():
        pooled, same, changed = (each.load()(film)[0] for each in (spec, spec, other))
    assert torch.equal(pooled, same)
    assert not torch.equal(pooled, changed)
    assert spec.digest() != other.digest()
    alone = spec.config.model_copy(update={"method": MethodConfig(name="infonce")})
    assert spec.digest() != replace(spec, run=replace(spec.run, config=alone)).digest()
    settings = spec.config.objective.model_copy(update={"mask_ratio": 0.25})  # of a method, it may change what is built
    same = spec.config.model_copy(update={"objective": settings})
    assert spec.digest() != replace(spec, run=replace(spec.run, config=same)).digest()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_squares_are_made_anew_where_boxes_have_changed(tmp_path: Path) -> None:
    images = boxed(tmp_path / "boxes", 3)
    rows = images.table.to_pylist()
    uri, _ = make_films(images, SIZE, 0.5, str(tmp_path))
    rows[0]["boxes"] = [{"kind": 0, "x0": 0.0, "y0": 0.0, "x1": 32.0, "y1": 32.0}]
    corrected = replace(images, table=image_table(rows))
    other, _ = make_films(corrected, SIZE, 0.5, str(tmp_path))
    assert other != uri
    assert load_films(other, corrected, SIZE).boxes[0].tolist() == [[0.0, 0.0, 16.0, 16.0]]
    assert len(parquet.read_table(uri)) == len(parquet.read_table(other)) == 3
