"""Random views of films on the training device, for methods that compare views of one film.

Crops, turns and tones are those that leave a radiograph readable; films are never mirrored. The gains of frequency bands follow
the energy bands of Philipsen et al. 2015 (IEEE TMI 34(9)); every strength is ours. All draws come from the film's key and the
number of the view: the same view on any rank and in any batch.

B studies, V views, R pixels of the stored square, H = W = size pixels of a view.
"""

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from cmcgns.config import Section
from cmcgns.data.batch import keyed_uniform

VIEW_STREAM = 16
"""Stream of the draws of view 0; each further view has the next one."""
DRAWS = 16
BAND_SIGMAS = (0.5, 1.0, 2.0, 4.0)
"""Pixels of the Gaussians, one after the other, that cut a film into frequency bands."""
SMALLEST_BLUR = 0.1
"""Pixels."""


class ViewSettings(Section):
    smallest_area: float = Field(0.3, gt=0.0, le=1.0)
    """Least share of the stored square that a view shows."""
    largest_area: float = Field(0.9, gt=0.0, le=1.0)
    """Largest share of the stored square that a view shows."""
    aspect: float = Field(4 / 3, ge=1.0)
    """Largest ratio of a crop's sides."""
    rotation: float = Field(10.0, ge=0.0, le=45.0)
    """Largest turn either way, degrees."""
    band_gain: float = Field(1.6, ge=1.0)
    """Largest factor, up or down, of the energy of each frequency band."""
    band_share: float = Field(0.5, ge=0.0, le=1.0)
    """Share of views whose bands are changed."""
    gamma: float = Field(1.5, ge=1.0)
    """Largest power, or one by it, to which grey values in [0, 1] are raised."""
    contrast: float = Field(0.4, ge=0.0, lt=1.0)
    """Largest change of the slope about the mean grey value."""
    brightness: float = Field(0.15, ge=0.0, le=1.0)
    """Largest shift of grey values in [0, 1]."""
    blur_share: float = Field(0.5, ge=0.0, le=1.0)
    """Share of views that are blurred."""
    blur: float = Field(2.0, ge=SMALLEST_BLUR)
    """Largest sigma of the blur in pixels."""


def random_views(stored_B1RR: Tensor, size: int, key_B: Tensor, number: int, own: ViewSettings) -> Tensor:
    """``number`` views of each film, float32 (V, B, 1, H, W) in [-1, 1]; grey values of the stored films are 0 to 255."""
    return torch.stack([random_view(stored_B1RR, size, key_B, view, own) for view in range(number)])


def random_view(stored_B1RR: Tensor, size: int, key_B: Tensor, view: int, own: ViewSettings) -> Tensor:
    """View ``view`` of each film, float32 (B, 1, H, W) in [-1, 1]."""
    draw_BC = keyed_uniform(key_B, DRAWS, VIEW_STREAM + view)
    grey_B1HW = turned_crop(stored_B1RR.float() / 255, size, draw_BC[:, :5], own)
    grey_B1HW = with_band_gains(grey_B1HW, draw_BC[:, 5:10], own)
    grey_B1HW = toned(grey_B1HW, draw_BC[:, 10:13], own)
    sigma_B = SMALLEST_BLUR + (own.blur - SMALLEST_BLUR) * draw_BC[:, 14]
    is_blurred_B111 = (draw_BC[:, 13] < own.blur_share)[:, None, None, None]
    blurred_B1HW = gaussian_blur(grey_B1HW, sigma_B, math.ceil(3 * own.blur))
    return torch.where(is_blurred_B111, blurred_B1HW, grey_B1HW) * 2 - 1


def turned_crop(grey_B1RR: Tensor, size: int, draw_B5: Tensor, own: ViewSettings) -> Tensor:
    """A rectangle of each film by its draws (area, aspect, place in both directions, turn), resized to a square.

    Sampled once, with bilinear weights; outside of the film is black.
    """
    stored = grey_B1RR.shape[-1]
    # float64: the float32 grid is then the same in any batch
    area_B, aspect_B, across_B, down_B, turn_B = draw_B5.double().unbind(dim=1)
    area_B = own.smallest_area + (own.largest_area - own.smallest_area) * area_B
    aspect_B = ((2 * aspect_B - 1) * math.log(own.aspect)).exp()
    width_B = ((area_B * aspect_B).sqrt() * stored).clamp(max=stored)
    height_B = ((area_B / aspect_B).sqrt() * stored).clamp(max=stored)
    centre_x_B = across_B * (stored - width_B) + width_B / 2
    centre_y_B = down_B * (stored - height_B) + height_B / 2
    angle_B = (2 * turn_B - 1) * math.radians(own.rotation)
    place_W = (torch.arange(size, device=grey_B1RR.device, dtype=torch.float64) + 0.5) / size - 0.5
    wide_B1W, high_BH1 = width_B[:, None, None] * place_W, height_B[:, None, None] * place_W[:, None]
    cos_B11, sin_B11 = angle_B.cos()[:, None, None], angle_B.sin()[:, None, None]
    column_BHW = centre_x_B[:, None, None] + cos_B11 * wide_B1W - sin_B11 * high_BH1
    row_BHW = centre_y_B[:, None, None] + sin_B11 * wide_B1W + cos_B11 * high_BH1
    grid_BHW2 = (torch.stack([column_BHW, row_BHW], dim=-1) * (2 / stored) - 1).to(grey_B1RR.dtype)
    return F.grid_sample(grey_B1RR, grid_BHW2, mode="bilinear", padding_mode="zeros", align_corners=False)


def with_band_gains(grey_B1HW: Tensor, draw_B5: Tensor, own: ViewSettings) -> Tensor:
    """Films whose frequency bands are scaled by the first four draws, where the fifth says so. Gains of 1 change nothing."""
    gain_B4 = ((2 * draw_B5[:, :4] - 1) * math.log(own.band_gain)).exp()
    rest_B1HW, changed_B1HW = grey_B1HW, torch.zeros_like(grey_B1HW)
    for band, sigma in enumerate(BAND_SIGMAS):
        smooth_B1HW = gaussian_blur(rest_B1HW, torch.full_like(gain_B4[:, 0], sigma), math.ceil(3 * sigma))
        changed_B1HW = changed_B1HW + gain_B4[:, band, None, None, None] * (rest_B1HW - smooth_B1HW)
        rest_B1HW = smooth_B1HW
    is_changed_B111 = (draw_B5[:, 4] < own.band_share)[:, None, None, None]
    return torch.where(is_changed_B111, changed_B1HW + rest_B1HW, grey_B1HW)


def toned(grey_B1HW: Tensor, draw_B3: Tensor, own: ViewSettings) -> Tensor:
    """Grey values in [0, 1] after a power, a slope about their mean and a shift, by three draws."""
    power_B, slope_B, shift_B = (2 * draw_B3 - 1)[:, :, None, None, None].unbind(dim=1)
    powered_B1HW = grey_B1HW.clamp(0, 1) ** (power_B * math.log(own.gamma)).exp()
    # float64: the mean is then the same in any batch
    mean_B111 = powered_B1HW.double().mean(dim=(1, 2, 3), keepdim=True).to(grey_B1HW.dtype)
    sloped_B1HW = mean_B111 + (1 + own.contrast * slope_B) * (powered_B1HW - mean_B111)
    return (sloped_B1HW + own.brightness * shift_B).clamp(0, 1)


def gaussian_blur(grey_B1HW: Tensor, sigma_B: Tensor, radius: int) -> Tensor:
    """Each film smoothed by a Gaussian of its own sigma in pixels, cut at ``radius``; the border repeats.

    Shifted copies are added up, in the same order in any batch.
    """
    offset_T = torch.arange(-radius, radius + 1, device=sigma_B.device, dtype=torch.float64)
    weight_BT = (-0.5 * (offset_T / sigma_B.double().unsqueeze(1)).square()).exp()
    weight_BT = (weight_BT / weight_BT.sum(1, keepdim=True)).to(grey_B1HW.dtype)
    for dim, padding in ((-1, (radius, radius, 0, 0)), (-2, (0, 0, radius, radius))):
        size, padded = grey_B1HW.shape[dim], F.pad(grey_B1HW, padding, mode="replicate")
        smooth_B1HW = torch.zeros_like(grey_B1HW)
        for tap, weight_B in enumerate(weight_BT.unbind(dim=1)):
            smooth_B1HW = smooth_B1HW + weight_B[:, None, None, None] * padded.narrow(dim, tap, size)
        grey_B1HW = smooth_B1HW
    return grey_B1HW
