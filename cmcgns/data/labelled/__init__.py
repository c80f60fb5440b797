"""Every downstream set behind one door: by name and folder, whatever its official layout."""

import difflib
from collections.abc import Callable

from cmcgns.data.image import Target
from cmcgns.data.labelled.base import ImageSet, Places, check_set
from cmcgns.data.labelled.classified import read_chexpert, read_covidx, read_nih
from cmcgns.data.labelled.corpus import labelled_set, phantom_set
from cmcgns.data.labelled.located import read_object_cxr, read_rsna, read_siim
from cmcgns.data.labelled.masked import read_masked
from cmcgns.data.readers import FileSource
from cmcgns.errors import UserError

__all__ = ["SETS", "ImageSet", "Places", "check_set", "labelled_set", "open_set", "phantom_set"]
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

    ``target``: what films will be shrunk to, so that JPEGs may be decoded at a reduced scale of twice that. ``draw_splits``:
    leave the splits that a table of one's own has written aside.

    Raises:
        UserError: an unknown name, or files that are not as the set publishes them.
    """
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"there is no downstream set '{name}'; {hint}known are {', '.join(SETS)}")
    source = FileSource(uri, name, (), seed, target, crop_borders)
    return check_set(read_masked(source, draw_splits) if name == "masked" else SETS[name](source))
