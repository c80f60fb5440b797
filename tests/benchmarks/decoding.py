"""Decoding of films on one core beside the obvious ways: JPEG at a reduced scale, 16-bit DICOM through one table.

Run alone: python -m tests.benchmarks.decoding
"""

import io
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import pydicom
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from cmcgns.data.decode import decode_image
from cmcgns.data.dicom import dicom_to_grey
from cmcgns.data.image import Target, resize_image
from cmcgns.phantom.writers import write_dicom
from tests.benchmarks.corpora import grainy_film, jpeg
from tests.benchmarks.measure import Line, interleaved, where

HEIGHT, WIDTH, SIDE = 2500, 3000, 256
WINDOW = (1700.0, 3000.0)


def pillow_full(data: bytes) -> np.ndarray:
    """All pixels by Pillow, then the mean of what each pixel covers."""
    return resize_image(np.asarray(Image.open(io.BytesIO(data)).convert("L")), SIDE)


def ours(data: bytes) -> np.ndarray:
    return resize_image(decode_image(data, "film.jpg", Target(SIDE, "longer")).grey_HW, SIDE)


def opencv_full(data: bytes) -> np.ndarray:
    return resize_image(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE), SIDE)


def pydicom_window(data: bytes) -> np.ndarray:
    """pydicom's own modality and VOI functions, which compute on every pixel."""
    film = pydicom.dcmread(io.BytesIO(data))
    shown = apply_voi_lut(apply_modality_lut(film.pixel_array, film), film)
    return np.rint(np.clip(shown / (2**film.BitsStored - 1), 0, 1) * 255).astype(np.uint8)


def twelve_bit_films(count: int) -> list[bytes]:
    """Windowed DICOM films of 12 bits stored in 16."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(count):
            grain = np.random.default_rng(number).integers(0, 12, (HEIGHT, WIDTH))
            stored = (grainy_film(number, HEIGHT, WIDTH).astype(np.uint16) * 12 + grain + 200).astype(np.uint16)
            path = Path(scratch) / "film.dcm"
            write_dicom(
                path, stored, photometric="MONOCHROME2", window=WINDOW, patient_id="1", study_id="2", image_id=str(number),
                view="PA",
            )  # fmt: skip
            found.append(path.read_bytes())
    return found


def race(ways: dict[str, Callable[[bytes], np.ndarray]], films: Sequence[bytes], rounds: int) -> dict[str, float]:
    """Films a second by way: the median film's time, all ways in turn."""
    runs = {f"{name} {number}": partial(way, film) for name, way in ways.items() for number, film in enumerate(films)}
    seconds = interleaved(runs, rounds, warm_up=1)
    per_way = {name: [s for run, each in seconds.items() if run.startswith(f"{name} ") for s in each] for name in ways}
    return {name: 1 / median(each) for name, each in per_way.items()}


def lines(films: int = 6, rounds: int = 5) -> list[Line]:
    """JPEG and DICOM."""
    jpegs = [jpeg(grainy_film(number, HEIGHT, WIDTH)) for number in range(films)]
    speed = race({"ours": ours, "Pillow": pillow_full, "OpenCV": opencv_full}, jpegs, rounds)
    error = float(np.mean([np.abs(ours(film).astype(float) - opencv_full(film)).mean() for film in jpegs]))
    dicoms = twelve_bit_films(max(films // 2, 1))
    dicom_speed = race({"ours": dicom_to_grey, "pydicom": pydicom_window}, dicoms, rounds)
    worst = max(int(np.abs(dicom_to_grey(film).astype(int) - pydicom_window(film)).max()) for film in dicoms)
    times, dicom_times = speed["ours"] / speed["Pillow"], dicom_speed["ours"] / dicom_speed["pydicom"]
    what = f"JPEG {HEIGHT} x {WIDTH} to {SIDE}"
    return [
        Line(f"{what}, beside Pillow's full decode", f"{times:.2f} x ({speed['ours']:.0f}/s)", ">= 1.5", times >= 1.5),
        Line(f"{what}, OpenCV's full decode", f"{speed['OpenCV']:.0f}/s"),
        Line(f"{what}, mean error against the whole film", f"{error:.2f} grey levels", "<= 0.35", error <= 0.35),
        Line(f"DICOM 12 bit {HEIGHT} x {WIDTH}, beside apply_voi_lut", f"{dicom_times:.2f} x ({dicom_speed['ours']:.0f}/s)",
             ">= 3", dicom_times >= 3),
        Line("DICOM, greatest difference from apply_voi_lut", f"{worst} grey levels", "0", worst == 0),
    ]  # fmt: skip


if __name__ == "__main__":
    print(where())
    print(*lines(), sep="\n")
