"""The phantom corpus: chest films, their reports and the truth about both, drawn from a seed."""

from cmcgns.data.phantom.contact import contact_sheet
from cmcgns.data.phantom.corpus import FilmTruth, PhantomCorpus, PhantomFilm, PhantomStudy
from cmcgns.data.phantom.findings import FINDINGS, Finding
from cmcgns.data.phantom.writers import write_mimic_cxr, write_mimic_cxr_jpg, write_pairs_csv

__all__ = [
    "FINDINGS",
    "FilmTruth",
    "Finding",
    "PhantomCorpus",
    "PhantomFilm",
    "PhantomStudy",
    "contact_sheet",
    "write_mimic_cxr",
    "write_mimic_cxr_jpg",
    "write_pairs_csv",
]
