"""Downstream sets, opened by name and folder whatever their official layout."""

import difflib
from collections.abc import Callable

from cmcgns.data.image import Target
from cmcgns.data.labelled.base import Annotations, ImageSet, check_set
from cmcgns.data.labelled.classified import read_chexpert, read_covidx, read_nih
from cmcgns.data.labelled.corpus import labelled_set, phantom_set
from cmcgns.data.labelled.located import read_object_cxr, read_rsna, read_siim, read_vindr
from cmcgns.data.labelled.own_table import OwnTable, read_labelled, read_masked
from cmcgns.data.readers import FileSource
from cmcgns.errors import UserError

__all__ = [
    "OWN_TABLES",
    "SETS",
    "Annotations",
    "ImageSet",
    "OwnTable",
    "check_set",
    "labelled_set",
    "open_set",
    "phantom_set",
]
PUBLISHED: dict[str, Callable[[FileSource], ImageSet]] = {
    "chexpert": read_chexpert,
    "nih": read_nih,
    "rsna": read_rsna,
    "siim": read_siim,
    "covidx": read_covidx,
    "object-cxr": read_object_cxr,
    "vindr-cxr": read_vindr,
}
OWN_TABLES: dict[str, Callable[[FileSource, OwnTable], ImageSet]] = {"masked": read_masked, "labelled": read_labelled}
"""Sets in a table of the user's own."""
SETS = (*PUBLISHED, *OWN_TABLES)
"""Names of the sets."""


def open_set(
    name: str,
    uri: str,
    seed: int = 0,
    target: Target | None = None,
    crop_borders: bool = True,
    own: OwnTable | None = None,
) -> ImageSet:
    """The downstream set ``name`` in the folder ``uri``.

    ``target``: size to which films will be shrunk; JPEGs may then be decoded at a reduced scale, at least twice as large.
    ``own``: how a user's own table is read.

    Raises:
        UserError: an unknown name, files that differ from the published ones, or findings or columns of a published set.
    """
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown downstream set '{name}'; {hint}give one of {', '.join(SETS)}")
    source, own = FileSource(uri, name, (), seed, target, crop_borders), own or OwnTable()
    if name in OWN_TABLES:
        return check_set(OWN_TABLES[name](source, own))
    given = next((key for key in ("findings", "columns", "films") if getattr(own, key)), None)
    if given:
        raise UserError(f"{name} is read as it is published; evaluate.{given} is for {' and '.join(OWN_TABLES)}")
    return check_set(PUBLISHED[name](source))
