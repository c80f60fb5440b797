"""The phantom corpus: chest films, reports and ground truth, generated from a seed."""

from cmcgns.phantom.corpus import FilmTruth, PhantomCorpus, PhantomFilm, PhantomStudy, contact_sheet
from cmcgns.phantom.findings import FINDINGS, Finding
from cmcgns.phantom.writers import write_mimic_cxr, write_mimic_cxr_jpg, write_pairs_csv

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
