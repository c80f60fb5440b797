"""``open-i``: the Indiana University collection, one XML file per report, films in the same or another folder."""

import logging
from dataclasses import dataclass
from pathlib import PurePosixPath
from xml.etree import ElementTree

import pandas as pd

from cmcgns import storage
from cmcgns.data.readers.base import CorpusOptions, FileSource, draw_splits, filter_views
from cmcgns.data.record import StudyIndex, index_of_films
from cmcgns.data.tables import read_table
from cmcgns.errors import BadRow, UserError

log = logging.getLogger(__name__)
FILM_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm")  # in order of preference
SECTIONS = ("COMPARISON", "INDICATION", "FINDINGS", "IMPRESSION")


@dataclass(frozen=True)
class OpenISource(FileSource):
    """XML reports and the films named by their ``parentImage`` elements."""

    def index(self) -> StudyIndex:
        files = storage.list_files(self.uri)
        films_by_id = _films_by_id(files)
        views = self._views(files)
        rows: list[dict[str, str]] = []
        bad_rows = []
        missing = 0
        for path in (name for name in files if name.endswith(".xml")):
            try:
                report, image_ids = _parse(self._read(path, "report"))
                present = [image for image in image_ids if image in films_by_id]
                if not present:
                    raise BadRow("all images of the report are missing" if image_ids else "report names no image")
                missing += len(image_ids) - len(present)
            except BadRow as error:
                bad_rows.append({"source": path, "reason": str(error)})
                continue
            study = PurePosixPath(path).stem
            rows += [
                {"study_id": study, "report": report, "image_id": image, "path": films_by_id[image]}
                | {"view": views.get(image, "")}
                for image in present
            ]
        if not rows and not bad_rows:
            raise UserError(f"{self.uri} contains no .xml report; check the path")
        return self._index(rows, bad_rows, missing)

    def _index(self, rows: list[dict[str, str]], bad_rows: list[dict[str, str]], missing: int) -> StudyIndex:
        films = pd.DataFrame(rows, columns=["study_id", "report", "image_id", "path", "view"])
        films, filtered = filter_views(films, self.views)
        if missing:
            filtered["image file is missing"] = missing
        # the collection has no patient ids: each report counts as one patient
        films = films.assign(patient_id=films["study_id"], group=films["study_id"])
        films = films.assign(split=draw_splits(self.seed, films["group"]))
        return StudyIndex(table=index_of_films(films), filtered=filtered, bad_rows=bad_rows)

    def _views(self, files: list[str]) -> dict[str, str]:
        """View by image id, from the collection's table of DICOM tags if it is present."""
        name = next((name for name in files if name.endswith(".csv") and "metadata" in name), None)
        if name is None:
            log.warning("no table of DICOM tags: views are unknown, so films of all views are kept")
            return {}
        table = read_table(storage.join(self.uri, name), ("imageid", "View Position"))
        if "imageid" not in table.columns or "View Position" not in table.columns:
            raise UserError(f"{name} has no columns imageid and View Position; remove it or download it again")
        return dict(zip(table["imageid"], table["View Position"], strict=True))


def _films_by_id(files: list[str]) -> dict[str, str]:
    """Path by image id; names of the collection's DICOM files lack the leading CXR, and some the number of their folder."""
    paths: dict[str, str] = {}
    for suffix in FILM_SUFFIXES:
        for path in files:
            if path.lower().endswith(suffix):
                stem, folder = PurePosixPath(path).name[: -len(suffix)], PurePosixPath(path).parent.name
                paths.setdefault(stem if stem.startswith("CXR") else f"CXR{stem}", path)
                if folder.isdigit():
                    paths.setdefault(f"CXR{folder}_{stem}", path)
    return paths


def _parse(data: bytes) -> tuple[str, list[str]]:
    """The report's text with its headers, and the ids of its images."""
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise BadRow(f"XML cannot be parsed (line {error.position[0]})") from None
    except (LookupError, ValueError):
        raise BadRow("XML cannot be parsed (unknown or wrong encoding)") from None
    texts: dict[str, str] = {}
    for part in root.iter("AbstractText"):
        name, text = (part.get("Label") or "").strip().upper(), " ".join("".join(part.itertext()).split())
        texts[name] = " ".join(filter(None, (texts.get(name), text)))
    if not texts.get("FINDINGS") and not texts.get("IMPRESSION"):
        raise BadRow("FINDINGS and IMPRESSION are both empty")
    others = sorted(set(texts) - set(SECTIONS) - {""})
    lines = [f"{name}: {texts[name]}" for name in (*others, *SECTIONS) if texts.get(name)]
    report = "\n".join([texts[""], *lines] if texts.get("") else lines)
    images = [(image.get("id") or "").strip() for image in root.iter("parentImage")]
    return report, [image for image in images if image]


def open_corpus(options: CorpusOptions) -> OpenISource:
    """The reader of ``open-i``."""
    return OpenISource(*options.of_files)
