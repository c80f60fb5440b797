"""The generated corpus as a source: every film is rendered when it is read."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cmcgns.data.image import CroppedImage, DecodedImage, uncropped, without_borders
from cmcgns.data.order import Arrangement, arranged
from cmcgns.data.readers.base import CorpusOptions
from cmcgns.data.record import StudyIndex, index_table
from cmcgns.data.reports import ParsedReport, parse_report
from cmcgns.errors import UserError

if TYPE_CHECKING:
    from cmcgns.phantom import PhantomCorpus

MAX_STUDIES = 10**7
CACHE_BYTES = 192 * 2**20
"""Rendered films cached by each process, so that a small corpus is not rendered again in each epoch."""


@dataclass(frozen=True)
class PhantomSource:
    """``studies`` generated studies with films of ``height`` x ``width`` pixels."""

    in_groups: ClassVar[bool] = False
    io_bound: ClassVar[bool] = False

    studies: int
    seed: int
    height: int
    width: int
    crop_borders: bool = True
    uri: str = "phantom"
    format: str = "phantom"

    def index(self) -> StudyIndex:
        corpus = _corpus(self)
        return StudyIndex(table=index_table([_row(corpus, number) for number in range(self.studies)]))

    def arrange(self, studies: pa.Table, group_studies: int) -> tuple[pa.Table, Arrangement]:
        return arranged(studies, group_studies)

    def reader(self, paths: Sequence[str], films: bool = True) -> "PhantomSource":
        return self

    def read_image(self, path: str) -> CroppedImage:
        study, number = path.split("/")
        film = DecodedImage(_renderer(self)(int(study), int(number)), self.height, self.width)
        return without_borders(film) if self.crop_borders else uncropped(film)

    def read_report(self, study: dict[str, Any]) -> str:
        return str(study["report"])

    def read_sentences(self, study: dict[str, Any], path: str) -> ParsedReport:
        return parse_report(self.read_report(study))


@functools.lru_cache(maxsize=4)
def _corpus(source: PhantomSource) -> "PhantomCorpus":
    from cmcgns.phantom import PhantomCorpus

    return PhantomCorpus(studies=source.studies, seed=source.seed, height=source.height, width=source.width)


@functools.lru_cache(maxsize=4)
def _renderer(source: PhantomSource) -> Callable[[int, int], NDArray[np.uint8]]:
    """Function that renders a film of a study, with a cache of ``CACHE_BYTES``."""
    corpus = _corpus(source)

    @functools.lru_cache(maxsize=CACHE_BYTES // (source.height * source.width))
    def render(study: int, film: int) -> NDArray[np.uint8]:
        pixels_HW: NDArray[np.uint8] = np.asarray(corpus.render(study, film), dtype=np.uint8)
        pixels_HW.flags.writeable = False  # shared through the cache
        return pixels_HW

    return render


def _row(corpus: "PhantomCorpus", number: int) -> dict[str, Any]:
    study = corpus.study(number)
    films = [
        {"image_id": film.image_id, "path": f"{number}/{position}", "view": film.view}
        for position, film in enumerate(study.films)
    ]
    return {
        "study_id": study.study_id,
        "patient_id": study.patient_id,
        "group": study.patient_id,
        "split": study.split,
        "films": films,
        "report": study.report,
        "labels": list(study.labels.items()),
    }


def parse_phantom_uri(uri: str, studies: int, seed: int) -> tuple[int, int]:
    """Studies and seed of ``phantom``, ``phantom:STUDIES`` or ``phantom:STUDIES:SEED``."""
    given = [part for part in uri.split(":")[1:] if part]
    if uri.split(":")[0] != "phantom" or len(given) > 2 or not all(part.isdigit() for part in given):
        raise UserError(
            f"data.uri {uri}: for the generated corpus give phantom, phantom:STUDIES or phantom:STUDIES:SEED"
        )
    numbers = [int(part) for part in given] + [studies, seed][len(given) :]
    if not 1 <= numbers[0] <= MAX_STUDIES:
        raise UserError(f"data.uri {uri} asks for {numbers[0]} studies; phantom:STUDIES takes 1 to {MAX_STUDIES}")
    return numbers[0], numbers[1]


def open_corpus(options: CorpusOptions) -> PhantomSource:
    """The generated corpus."""
    studies, seed = parse_phantom_uri(options.uri, options.phantom_studies, options.seed)
    return PhantomSource(studies, seed, options.phantom_size, options.phantom_size, options.crop_borders)
