"""Augmented films: the same for a study in an epoch wherever it is trained, and never mirrored."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from cmcgns.config import DataConfig
from cmcgns.data.batch import (
    AUGMENT_STREAM,
    Batcher,
    augmented_crop,
    crop,
    keyed_uniform,
    normalise,
    toned,
    turned_crop,
)
from cmcgns.data.order import draw_key
from cmcgns.methods.base import load_method
from tests.small import small_config, small_model
from tests.train.memory import MemoryBlocks

CPU = torch.device("cpu")
STRENGTHS: dict[str, Any] = {
    "augment_rotation": 10.0, "augment_scale": 0.1, "augment_brightness": 0.3, "augment_contrast": 0.3,
}  # fmt: skip


def data_of(**strengths: float) -> DataConfig:
    return DataConfig(image_size=32, resize=40, **strengths)


@pytest.fixture
def key_B() -> Tensor:
    return torch.tensor([draw_key(0, epoch, f"film {number}") for epoch in range(3) for number in range(11)])


@pytest.fixture
def image_B1RR(key_B: Tensor) -> Tensor:
    return torch.randint(0, 256, (len(key_B), 1, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_strength_zero_is_the_crop_bit_for_bit(image_B1RR: Tensor, key_B: Tensor) -> None:
    plain = augmented_crop(image_B1RR, data_of(), key_B)
    assert plain.dtype == torch.uint8
    assert torch.equal(plain, crop(image_B1RR, 32, key_B))
    still_B = torch.zeros(len(key_B))
    turned = turned_crop(image_B1RR, 32, key_B, still_B, still_B + 1)
    torch.testing.assert_close(turned, crop(image_B1RR, 32, key_B).float(), rtol=0, atol=0.02)
    torch.testing.assert_close(toned(plain, still_B + 1, still_B), plain.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", STRENGTHS)
def test_each_strength_changes_films_and_black_stays_black(name: str, image_B1RR: Tensor, key_B: Tensor) -> None:
    data = data_of(**{name: STRENGTHS[name]})
    film_B1HW = augmented_crop(image_B1RR, data, key_B)
    assert film_B1HW.shape == (len(key_B), 1, 32, 32)
    change_B = (film_B1HW - crop(image_B1RR, 32, key_B).float()).abs().mean(dim=(1, 2, 3))
    assert (change_B > 0).all()
    assert change_B.mean() > 2
    assert film_B1HW.min() >= 0
    assert film_B1HW.max() <= 255.001
    assert not augmented_crop(torch.zeros_like(image_B1RR), data, key_B).any()


def test_a_film_does_not_depend_on_the_batch_it_is_in(image_B1RR: Tensor, key_B: Tensor) -> None:
    data = data_of(**STRENGTHS)
    whole = augmented_crop(image_B1RR, data, key_B)
    assert torch.equal(whole, augmented_crop(image_B1RR, data, key_B))
    order = torch.randperm(len(key_B))
    assert torch.equal(augmented_crop(image_B1RR[order], data, key_B[order]), whole[order])
    for one in range(len(key_B)):
        alone = augmented_crop(image_B1RR[one : one + 1], data, key_B[one : one + 1])
        assert torch.equal(alone, whole[one : one + 1]), one


def test_epochs_and_studies_draw_each_its_own(key_B: Tensor) -> None:
    film_B1RR = torch.randint(0, 256, (1, 1, 40, 40), dtype=torch.uint8).expand(len(key_B), 1, 40, 40)
    films = augmented_crop(film_B1RR, data_of(augment_brightness=0.3), key_B)
    brightness = {round(float(value), 3) for value in films.mean(dim=(1, 2, 3))}
    assert len(brightness) > len(key_B) - 3


def test_draws_use_the_whole_range_evenly() -> None:
    draws_NC = keyed_uniform(torch.arange(4000), 4, AUGMENT_STREAM) * 2 - 1
    assert draws_NC.mean(dim=0).abs().max() < 0.05
    assert draws_NC.min() < -0.99
    assert draws_NC.max() > 0.99


def lit(row: int, column: int, side: int = 41) -> Tensor:
    film_11RR = torch.zeros(1, 1, side, side, dtype=torch.uint8)
    film_11RR[0, 0, row, column] = 200
    return film_11RR


def brightest(film_11HW: Tensor) -> tuple[int, int]:
    return divmod(int(film_11HW[0, 0].argmax()), film_11HW.shape[-1])


@pytest.mark.parametrize("degrees", [0, 30, -30, 90, 180])
@pytest.mark.parametrize("zoom", [1.0, 1.5, 0.8])
def test_a_pixel_goes_where_a_counter_clockwise_turn_takes_it(degrees: int, zoom: float) -> None:
    right, up = 8, 3
    angle = math.radians(degrees)
    expected_right = zoom * (math.cos(angle) * right - math.sin(angle) * up)
    expected_up = zoom * (math.sin(angle) * right + math.cos(angle) * up)
    film = turned_crop(
        lit(20 - up, 20 + right), 41, torch.zeros(1, dtype=torch.int64), torch.tensor([angle]), torch.tensor([zoom])
    )
    row, column = brightest(film)
    assert abs(row - (20 - expected_up)) <= 1
    assert abs(column - (20 + expected_right)) <= 1


def test_a_turn_matches_a_slow_loop(image_B1RR: Tensor, key_B: Tensor) -> None:
    """Bilinear interpolation written out for a few pixels; outside the stored film is 0."""
    angle_B = torch.linspace(-0.4, 0.4, len(key_B))
    zoom_B = torch.linspace(0.7, 1.4, len(key_B))
    turned = turned_crop(image_B1RR, 32, key_B, angle_B, zoom_B)
    corners_B2 = (keyed_uniform(key_B, 2, 1) * 9).long()
    for b in range(0, len(key_B), 5):
        stored = np.pad(image_B1RR[b, 0].numpy().astype(float), 40)
        top, left = corners_B2[b].tolist()
        for row, column in ((0, 0), (0, 31), (31, 5), (16, 12), (7, 30)):
            right, down = column - 15.5, row - 15.5
            cosine, sine = math.cos(angle_B[b]) / zoom_B[b].item(), math.sin(angle_B[b]) / zoom_B[b].item()
            x = left + 15.5 + cosine * right - sine * down
            y = top + 15.5 + sine * right + cosine * down
            x0, y0 = math.floor(x), math.floor(y)
            value = sum(
                (1 - abs(x - i)) * (1 - abs(y - j)) * stored[j + 40, i + 40] for i in (x0, x0 + 1) for j in (y0, y0 + 1)
            )
            assert float(turned[b, 0, row, column]) == pytest.approx(value, abs=0.05)


def test_films_are_never_mirrored() -> None:
    """The heart's side: a spot in the upper left quarter stays there through every draw."""
    data = DataConfig(
        image_size=36, resize=41, augment_rotation=45.0, augment_scale=0.5, augment_brightness=1.0, augment_contrast=0.5
    )
    key_B = torch.arange(500)
    films = augmented_crop(lit(20, 12).expand(500, 1, 41, 41), data, key_B)
    columns = films.amax(dim=(1, 2)).argmax(dim=1)
    assert (columns < 18).all()


def test_tones_change_slope_at_mid_grey_and_keep_the_order_of_greys() -> None:
    grey_11HW = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16)
    for gamma, contrast in ((1.0, 0.5), (1.0, -0.5), (2.0, 0.3), (0.5, -0.3)):
        tone = toned(grey_11HW, torch.tensor([gamma]), torch.tensor([contrast])).flatten()
        assert (float(tone[0]), float(tone[-1])) == pytest.approx((0.0, 255.0))
        assert (tone.diff() >= 0).all()
        if gamma == 1.0:
            assert float(tone[128] - tone[127]) == pytest.approx(1 + contrast, rel=1e-3)


def test_training_sees_augmented_films_on_any_number_of_ranks_and_validation_does_not() -> None:
    strengths = {f"data__{name}": value for name, value in STRENGTHS.items()}
    config = small_config(**strengths)
    batcher = Batcher(config, 0, CPU)
    source = MemoryBlocks(config, 16)
    blocks = list(source.whole())
    seen = {}
    for block in blocks:
        batch = batcher(block, (1,), training=True)
        assert batch.image_B1HW.dtype == torch.float32
        for key, film_1HW in zip(block.draw_keys, batch.image_B1HW, strict=True):
            seen[int(key)] = film_1HW
        stored_B1RR = torch.from_numpy(block.images_BRR).unsqueeze(1)
        validated = batcher(block, (1,), training=False).image_B1HW
        assert torch.equal(validated, normalise(crop(stored_B1RR, config.data.image_size, None)))
        assert not torch.equal(batch.image_B1HW, normalise(crop(stored_B1RR, 32, torch.from_numpy(block.draw_keys))))
    # as two microbatches of other sizes, as another number of workers would cut them
    wide = small_config(microbatch_size=8, num_workers=1, global_batch_size=8, **strengths)
    for block in MemoryBlocks(wide, 16).whole():
        batch = Batcher(wide, 0, CPU)(block, (1,), training=True)
        for key, film_1HW in zip(block.draw_keys, batch.image_B1HW, strict=True):
            assert torch.equal(film_1HW, seen[int(key)])


def test_the_reconstruction_is_of_the_augmented_film() -> None:
    config = small_config(**{f"data__{name}": value for name, value in STRENGTHS.items()})
    [block, *_] = MemoryBlocks(config, 8).whole()
    batch = Batcher(config, 0, CPU)(block, (int(block.sentence_counts.sum()),), training=True)
    method = load_method(config)
    outputs = small_model(config).eval()(batch, 2)
    perfect = outputs._replace(reconstruction_B1HW=batch.image_B1HW)
    terms = dict(zip(method.terms(2), method.losses(perfect, batch, {"sentences": None}, 2, 1).terms, strict=True))
    assert float(terms["loss_reconstruction"]) == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"augment_rotation": 90}, "augment_rotation\n.*less than or equal to 45"),
        ({"augment_rotation": -1}, "augment_rotation\n.*greater than or equal to 0"),
        ({"augment_scale": 0.6}, "augment_scale\n.*less than or equal to 0.5"),
        ({"augment_brightness": 2}, "augment_brightness\n.*less than or equal to 1"),
        ({"augment_contrast": 0.7}, "augment_contrast\n.*less than or equal to 0.5"),
        ({"augment_contrast": float("nan")}, "augment_contrast\n.*finite"),
        ({"augment_flip": 0.5}, "augment_flip\n.*[Ee]xtra"),
    ],
)
def test_strengths_that_no_film_survives_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_augments_alike_and_does_not_wait(image_B1RR: Tensor, key_B: Tensor) -> None:
    data = data_of(**STRENGTHS)
    on_gpu = image_B1RR.cuda(), key_B.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        films = augmented_crop(on_gpu[0], data, on_gpu[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(films.cpu(), augmented_crop(image_B1RR, data, key_B), rtol=0, atol=0.05)
