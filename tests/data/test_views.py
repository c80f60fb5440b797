"""Random views of films: functions of the film's key, never mirrored, and identities at strength zero."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cmcgns.data.order import draw_key
from cmcgns.data.views import (
    BAND_SIGMAS,
    DRAWS,
    VIEW_STREAM,
    ViewSettings,
    gaussian_blur,
    keyed_uniform,
    random_view,
    random_views,
    toned,
    turned_crop,
    with_band_gains,
)

STILL = ViewSettings(
    smallest_area=1.0, largest_area=1.0, aspect=1.0, rotation=0.0, band_gain=1.0, gamma=1.0, contrast=0.0, brightness=0.0,
    blur_share=0.0,
)  # fmt: skip


def keys(epochs: int, films: int) -> Tensor:
    return torch.tensor([draw_key(0, epoch, f"film {number}") for epoch in range(epochs) for number in range(films)])


@pytest.fixture
def stored_B1RR() -> Tensor:
    return torch.randint(0, 256, (12, 1, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_views_follow_the_key_and_differ(stored_B1RR: Tensor) -> None:
    key_B, own = keys(2, 6), ViewSettings()
    whole = random_views(stored_B1RR, 32, key_B, 3, own)
    assert whole.shape == (3, 12, 1, 32, 32)
    assert whole.dtype == torch.float32
    assert whole.min() >= -1.0
    assert whole.max() <= 1.0
    order = torch.randperm(12)
    assert torch.equal(random_views(stored_B1RR[order], 32, key_B[order], 3, own), whole[:, order])
    for one in range(12):
        alone = random_views(stored_B1RR[one : one + 1], 32, key_B[one : one + 1], 3, own)
        assert torch.equal(alone, whole[:, one : one + 1]), one
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert ((whole[a] - whole[b]).abs().amax(dim=(1, 2, 3)) > 0.05).all()


def test_strength_zero_shows_the_film(stored_B1RR: Tensor) -> None:
    found = random_view(stored_B1RR, 40, keys(2, 6), 0, STILL)
    torch.testing.assert_close(found, stored_B1RR.float() / 127.5 - 1, rtol=0, atol=1e-4)


def test_gains_of_1_change_nothing_and_others_scale_their_band() -> None:
    grey_B1HW = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    draw_B5 = torch.full((3, 5), 0.5)
    draw_B5[:, 4] = 0.0
    torch.testing.assert_close(with_band_gains(grey_B1HW, draw_B5, ViewSettings()), grey_B1HW, rtol=0, atol=1e-5)
    draw_B5[:, 4] = 0.7  # not drawn
    assert torch.equal(with_band_gains(grey_B1HW, torch.rand_like(draw_B5).clamp(min=0.6), ViewSettings()), grey_B1HW)
    draw_B5[:, 4], draw_B5[:, 1] = 0.0, 1.0  # the second band by 1.6
    found = with_band_gains(grey_B1HW, draw_B5, ViewSettings())
    first = gaussian_blur(grey_B1HW, torch.full((3,), BAND_SIGMAS[0]), 2)
    band = first - gaussian_blur(first, torch.full((3,), BAND_SIGMAS[1]), 3)
    torch.testing.assert_close(found, grey_B1HW + 0.6 * band, rtol=0, atol=1e-5)


def test_the_blur_is_a_gaussian_of_each_films_own_sigma() -> None:
    grey_B1HW = torch.rand(4, 1, 20, 24, generator=torch.Generator().manual_seed(2))
    sigma_B = torch.tensor([0.1, 0.7, 1.3, 2.0])
    found = gaussian_blur(grey_B1HW, sigma_B, 6)
    for i, sigma in enumerate(sigma_B.tolist()):
        weights = [math.exp(-(t**2) / (2 * sigma**2)) for t in range(-6, 7)]
        weights = [each / sum(weights) for each in weights]
        film = np.pad(grey_B1HW[i, 0].numpy().astype(np.float64), 6, mode="edge")
        for y, x in ((0, 0), (3, 5), (19, 23), (10, 12)):
            square = film[y : y + 13, x : x + 13]
            assert float(found[i, 0, y, x]) == pytest.approx(
                float(np.outer(weights, weights).ravel() @ square.ravel()), abs=1e-5
            )
    torch.testing.assert_close(found[0], grey_B1HW[0], rtol=0, atol=1e-6)  # a sigma of 0.1 pixels


def test_tones_are_a_power_a_slope_and_a_shift() -> None:
    grey_B1HW = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    draw_B3 = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    found = toned(grey_B1HW, draw_B3, ViewSettings())
    for i, (power, slope, shift) in enumerate(((1.5, 0.6, 0.15), (1 / 1.5, 1.4, -0.15))):
        powered = grey_B1HW[i] ** power
        expected = (powered.mean() + slope * (powered - powered.mean()) + shift).clamp(0, 1)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-6)


def test_crops_cover_the_shares_of_the_film_that_the_settings_say() -> None:
    """Films are ramps, so that a view says which part of the film it shows."""
    ramp = torch.arange(64.0).expand(1, 1, 64, 64) / 64 * 255
    own = ViewSettings(rotation=0.0, band_share=0.0, gamma=1.0, contrast=0.0, brightness=0.0, blur_share=0.0)
    shares = []
    for key in keys(20, 10):
        across = random_view(ramp, 32, key[None], 0, own)[0, 0, 16]
        down = random_view(ramp.mT, 32, key[None], 0, own)[0, 0, :, 16]
        sides = [(line[30] - line[1]) / 2 / 29 * 32 for line in (across, down)]
        shares.append(float(sides[0] * sides[1]))
        assert 0.75 - 0.02 < sides[0] / sides[1] < 4 / 3 + 0.02
    assert 0.28 < min(shares) < 0.36
    assert 0.8 < max(shares) < 0.92


def test_the_left_marker_of_a_view_stays_left_of_the_right_one() -> None:
    key_B = keys(50, 20)
    left, right = torch.zeros(2, 1, 1, 64, 64).unbind(0)
    left[..., 30:34, 20:24], right[..., 30:34, 40:44] = 1.0, 1.0
    seen, place = 0, torch.arange(32.0)
    draw_B5 = keyed_uniform(key_B, DRAWS, VIEW_STREAM)[:, :5]
    where = []
    for marker in (left, right):
        shown_BW = turned_crop(marker.expand(len(key_B), -1, -1, -1), 32, draw_B5, ViewSettings()).sum(dim=(1, 2))
        where.append((shown_BW.sum(1), shown_BW @ place / shown_BW.sum(1).clamp(min=1e-6)))
    visible_B = (where[0][0] > 0.5) & (where[1][0] > 0.5)
    seen = int(visible_B.sum())
    assert seen > 300
    assert (where[0][1] < where[1][1])[visible_B].all()
