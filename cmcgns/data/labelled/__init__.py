"""Downstream sets, opened by name and folder whatever their official layout."""

import difflib
from collections.abc import Callable

from cmcgns.data.image import Target
from cmcgns.data.labelled.base import Annotations, ImageSet, check_set
from cmcgns.data.labelled.classified import read_chexpert, read_covidx, read_nih
from cmcgns.data.labelled.corpus import labelled_set, phantom_set
from cmcgns.data.labelled.located import read_object_cxr, read_rsna, read_siim
from cmcgns.data.labelled.masked import read_masked
from cmcgns.data.readers import FileSource
from cmcgns.errors import UserError

__all__ = ["SETS", "Annotations", "ImageSet", "check_set", "labelled_set", "open_set", "phantom_set"]
SETS: dict[str, Callable[[FileSource], ImageSet]] = {
    "chexpert": read_chexpert,
    "nih": read_nih,
    "rsna": read_rsna,
    "siim": read_siim,
    "covidx": read_covidx,
    "object-cxr": read_object_cxr,
    "masked": read_masked,
}


def open_set(
    name: str,
    uri: str,
    seed: int = 0,
    target: Target | None = None,
    crop_borders: bool = True,
    draw_splits: bool = False,
) -> ImageSet:
    """The downstream set ``name`` in the folder ``uri``.

    ``target``: size to which films will be shrunk; JPEGs may then be decoded at a reduced scale, at least twice as large.
    ``draw_splits``: ignore the splits given in a user's own table.

    Raises:
        UserError: an unknown name, or files that differ from the published ones.
    """
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown downstream set '{name}'; {hint}give one of {', '.join(SETS)}")
    source = FileSource(uri, name, (), seed, target, crop_borders)
    return check_set(read_masked(source, draw_splits) if name == "masked" else SETS[name](source))
