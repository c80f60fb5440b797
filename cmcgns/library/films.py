"""Films as users have them (files, S3, bytes, DICOM, pictures, arrays), read like those of a corpus.

H, W pixels of a film, R side of the padded square.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cmcgns import storage
from cmcgns.config import DataConfig
from cmcgns.data.decode import decode_image, grey_of
from cmcgns.data.image import MAX_PIXELS, DecodedImage, Target, resize_image, uncropped, without_borders
from cmcgns.errors import BadRow, UserError
from cmcgns.storage.ahead import map_ahead

FilmLike = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.generic]
"""A path, an `s3://` URI, the bytes of a file (JPEG, PNG, TIFF, BMP, WebP, DICOM), a PIL image, an array (H, W) or (H, W, 3)."""
FILM_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".tif", ".tiff", ".bmp", ".webp")
READERS = 8
"""Threads that fetch and decode."""


def film_list(films: Iterable[FilmLike]) -> list[FilmLike]:
    """``films`` as a list; raises ``UserError`` for a single film."""
    if isinstance(films, (str, bytes, os.PathLike, Image.Image, np.ndarray)):
        raise UserError(f"films: got one {type(films).__name__}; give a list of films, such as [film]")
    return list(films)


def read_squares(films: Sequence[FilmLike], data: DataConfig, ahead: int) -> Iterator[NDArray[np.uint8]]:
    """Each film as a padded square, uint8 (R, R), in order; up to ``ahead`` are decoded before they are needed.

    Raises:
        UserError: one of them cannot be read, by its number.
    """
    return map_ahead(lambda item: read_square(item[1], data, f"film {item[0]}"), enumerate(films), READERS, ahead)


def read_square(film: FilmLike, data: DataConfig, name: str = "film") -> NDArray[np.uint8]:
    """The film as a padded square, uint8 (R, R), as in pretraining; messages call it ``name``."""
    if isinstance(film, os.PathLike) or (isinstance(film, str) and _is_path(film)):
        name = f"{name} ({film})"
    try:
        image = _decoded(film, name, Target(data.resize, "longer"))
        kept = without_borders(image) if data.crop_borders else uncropped(image)
        return resize_image(kept.grey_HW, data.resize)
    except BadRow as reason:
        raise UserError(f"{name} cannot be used: {reason}") from None


def _decoded(film: FilmLike, name: str, target: Target) -> DecodedImage:
    if isinstance(film, str | os.PathLike):
        return decode_image(_file(str(film), name), str(film), target)
    if isinstance(film, bytes):
        return decode_image(film, "", target)
    if isinstance(film, Image.Image):
        if film.width * film.height > MAX_PIXELS:
            raise BadRow(f"{film.height} x {film.width} pixels are over the limit of {MAX_PIXELS}")
        return _whole(grey_of(ImageOps.exif_transpose(film)))
    if isinstance(film, np.ndarray):
        return _whole(_grey_array(film))
    raise UserError(
        f"{name} is of type {type(film).__name__}; give a path, an s3:// URI, bytes, a PIL image or an array"
    )


def _file(path: str, name: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except ValueError as error:  # a UserError, or a character that no path has
        if not _is_path(path):  # it may be a report: never printed
            raise UserError(
                f"{name} is a text of {len(path)} characters and not the path of a file; give films here, and texts to "
                "embed_reports"
            ) from None
        if isinstance(error, storage.MissingFileError):
            raise UserError(f"{name} is not a file; check the path") from None
        raise


def _is_path(text: str) -> bool:
    """Whether ``text`` looks like the name of a film and not like a report."""
    return storage.is_s3(text) or text.lower().endswith(FILM_SUFFIXES) or Path(text).is_absolute()


def _grey_array(pixels: NDArray[np.generic]) -> NDArray[np.uint8]:
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)) or not pixels.size:
        raise BadRow(f"an array of shape {pixels.shape} is no film; give (H, W), or (H, W, 3) in colour")
    if pixels.dtype == np.uint8:
        return np.asarray(pixels, np.uint8) if pixels.ndim == 2 else grey_of(Image.fromarray(pixels))
    if pixels.ndim == 3 or not np.issubdtype(pixels.dtype, np.number) or np.iscomplexobj(pixels):
        raise BadRow(
            f"an array of {pixels.dtype} and shape {pixels.shape} is no film; give uint8, or (H, W) of any numbers"
        )
    return grey_of(Image.fromarray(pixels.astype(np.float32)))  # scaled from its least value to its greatest


def _whole(grey_HW: NDArray[np.uint8]) -> DecodedImage:
    return DecodedImage(grey_HW, *grey_HW.shape)
