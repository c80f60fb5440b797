"""A corpus reader in one file: a folder for each study, with ``film.png`` and ``report.txt``."""

import pandas as pd

from cmcgns import storage
from cmcgns.data.readers.base import CorpusOptions, FileSource, draw_splits
from cmcgns.data.record import StudyIndex, index_of_films


class FolderSource(FileSource):
    def index(self):
        studies = pd.Series(sorted(storage.list_folders(self.uri)), dtype=str)
        films = pd.DataFrame(
            {
                "study_id": studies,
                "patient_id": studies,
                "group": studies,  # what splits keep together
                "split": draw_splits(self.seed, studies),
                "image_id": studies,
                "path": studies + "/film.png",
                "report_path": studies + "/report.txt",
            }
        )
        return StudyIndex(table=index_of_films(films))


def open_corpus(options: CorpusOptions):
    return FolderSource(*options.of_files)
