"""The phantom corpus: any number of chest studies, each a function of the seed and its index only."""

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from cmcgns.phantom.anatomy import Patient
from cmcgns.phantom.canvas import Draws, digest, permuted
from cmcgns.phantom.film import FilmFacts, Painting, paint, without
from cmcgns.phantom.findings import BEDSIDE, FINDINGS, Condition, Finding, draw_findings
from cmcgns.phantom.lesions import Mask
from cmcgns.phantom.report_text import ReportFacts, write_report

BLOCK = 12
"""Studies that are assigned to patients together."""
NUMBERS = 10**7
"""Number of distinct ids of patients, and of studies."""
Box = list[float]
"""x0, y0, x1, y1 in pixels; x1 and y1 are exclusive."""


@dataclass(frozen=True)
class PhantomFilm:
    """One film of a study."""

    image_id: str
    view: str
    """``PA`` or ``AP``."""


@dataclass(frozen=True)
class PhantomStudy:
    """A study without its pixels."""

    study_id: str
    patient_id: str
    split: str
    """``train``, ``valid`` or ``test``, the same for all studies of a patient."""
    films: tuple[PhantomFilm, ...]
    findings: tuple[Finding, ...]
    labels: Mapping[str, float]
    """1 or 0 for every name of ``FINDINGS``; all 0 is a normal study."""
    report: str
    patient: Patient
    condition: Condition


@dataclass(frozen=True)
class FilmTruth:
    """Labels, boxes and masks of one film."""

    labels: Mapping[str, float]
    boxes: Mapping[str, list[Box]]
    """Boxes by finding: one per location, so two for a bilateral finding."""
    masks: Mapping[str, Mask]
    """Masks by finding, and of ``lung_right``, ``lung_left`` and ``heart``."""


@dataclass(frozen=True)
class PhantomCorpus:
    """``studies`` chest studies; a longer corpus of the same seed starts with the shorter one."""

    studies: int
    seed: int = 0
    height: int = 256
    """Pixels; the anatomy is the same at every size."""
    width: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.studies <= NUMBERS:
            raise ValueError(f"studies {self.studies} is outside 0 to {NUMBERS}")
        if min(self.height, self.width) < 32:
            raise ValueError(f"film size {self.height} x {self.width} is under the least, 32 x 32")

    def __len__(self) -> int:
        return self.studies

    def study(self, i: int) -> PhantomStudy:
        """Study ``i``, without its pixels."""
        patient, turn = self._patient(self._index(i))
        condition, findings = self._facts(i, patient)
        prior = self._facts(i - 1, patient)[1] if turn else None
        names = {finding.name for finding in findings}
        return PhantomStudy(
            study_id=f"s5{permuted(i, NUMBERS, self.seed, 'study'):07d}",
            patient_id=patient.patient_id,
            split=split_of(patient.key),
            films=tuple(PhantomFilm(self._image_id(i, k), view) for k, view in enumerate(condition.views)),
            findings=findings,
            labels={name: float(name in names) for name in FINDINGS},
            report=write_report(ReportFacts(patient, condition, findings, prior), self.seed, i),
            patient=patient,
            condition=condition,
        )

    def render(self, i: int, film: int = 0) -> npt.NDArray[np.uint8]:
        """One film of study ``i``, (height, width)."""
        return self._paint(i, film).pixels

    def render_without(self, i: int, finding: str, film: int = 0) -> npt.NDArray[np.uint8]:
        """The same film without ``finding``."""
        return paint(without(self._film_facts(i, film), finding), self.height, self.width).pixels

    def truth(self, i: int, film: int = 0) -> FilmTruth:
        """Labels, boxes and masks of one film of study ``i``."""
        painting = self._paint(i, film)
        boxes: dict[str, list[Box]] = {}
        masks = dict(painting.structures)
        for finding, lesion in painting.lesions:
            seen = [mask for mask in lesion.masks if mask.any()]
            boxes.setdefault(finding.name, []).extend(box_of(mask) for mask in seen)
            for mask in seen:
                masks[finding.name] = masks[finding.name] | mask if finding.name in masks else mask
        return FilmTruth(labels=self.study(i).labels, boxes=boxes, masks=masks)

    def _paint(self, i: int, film: int) -> Painting:
        return paint(self._film_facts(i, film), self.height, self.width)

    def _film_facts(self, i: int, film: int) -> FilmFacts:
        """The facts of film ``film`` of study ``i``."""
        patient, _ = self._patient(self._index(i))
        condition, findings = self._facts(i, patient)
        if not 0 <= film < len(condition.views):
            raise IndexError(f"study {i} has {len(condition.views)} film(s), not a film {film}")
        return FilmFacts(patient, condition, findings, (self.seed, i), film)

    def _facts(self, i: int, patient: Patient) -> tuple[Condition, tuple[Finding, ...]]:
        """Condition and findings of study ``i``."""
        findings = draw_findings(patient, self.seed, i)
        bedside = any(finding.kind in BEDSIDE for finding in findings)
        return Condition.draw(bedside, self.seed, i), findings

    def _patient(self, i: int) -> tuple[Patient, int]:
        """The patient of study ``i``, and the number of their earlier studies."""
        block, index = divmod(i, BLOCK)
        for number, size in enumerate(_shares(self.seed, block)):
            if index < size:
                return _draw_patient(self.seed, block, number), index
            index -= size
        raise AssertionError("a block's shares add up to it")

    def _index(self, i: int) -> int:
        if not 0 <= i < self.studies:
            raise IndexError(f"study {i} is outside a corpus of {self.studies}")
        return i

    def _image_id(self, i: int, film: int) -> str:
        text = digest(self.seed, i, film, "image")[:20].hex()
        return "-".join(text[k : k + 8] for k in range(0, 40, 8))


def split_of(key: str) -> str:
    """``train`` for about 80 of 100 patients, ``valid`` and ``test`` for 10 each."""
    return Draws(key, "split").weighted((("train", 0.8), ("valid", 0.1), ("test", 0.1)))


def box_of(mask: Mask) -> Box:
    """The smallest box around a mask that is not empty."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)]


@lru_cache(maxsize=4096)
def _shares(seed: int, block: int) -> tuple[int, ...]:
    """Number of studies of each patient of a block, one to four."""
    d = Draws(seed, "block", block)
    sizes: list[int] = []
    while (left := BLOCK - sum(sizes)) > 0:
        sizes.append(min(left, d.weighted(((1, 0.45), (2, 0.30), (3, 0.15), (4, 0.10)))))
    return tuple(sizes)


@lru_cache(maxsize=4096)
def _draw_patient(seed: int, block: int, number: int) -> Patient:
    """Patient ``number`` of a block; cached because a patient has several studies."""
    digits = permuted(block * BLOCK + number, NUMBERS, seed, "patient")
    return Patient.draw(f"p1{digits:07d}", seed, block, number)


_LINE = 13  # pixels
_MAX_LINES = 14


def contact_sheet(corpus: PhantomCorpus, path: str | Path, rows: int = 6, cols: int = 6, start: int = 0) -> Path:
    """Write ``path``, a PNG of the first films of ``rows`` x ``cols`` studies, each above its findings and impression."""
    height, width = corpus.height, corpus.width
    cell = height + _MAX_LINES * _LINE + 8
    sheet = Image.new("L", (cols * width, rows * cell), 255)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    for k in range(min(rows * cols, corpus.studies - start)):
        left, top = k % cols * width, k // cols * cell
        sheet.paste(Image.fromarray(corpus.render(start + k)), (left, top))
        text = "\n".join(_lines(corpus.study(start + k).report, int(width / 5.4)))
        pen.multiline_text((left + 4, top + height + 3), text, fill=0, font=font, spacing=2)
    sheet.save(path)
    return Path(path)


def _lines(report: str, columns: int) -> list[str]:
    """FINDINGS and IMPRESSION in lines of ``columns`` characters, cut at the end of the cell."""
    body = re.search(r"(FINDINGS|IMPRESSION):.*", report, re.DOTALL)
    paragraphs = (body.group() if body else report).replace("  ", " ").split("\n")
    return [line for part in paragraphs if part for line in textwrap.wrap(part, columns)][:_MAX_LINES]
