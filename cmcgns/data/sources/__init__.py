"""Every corpus behind one protocol: an index of its studies, then films and reports one at a time."""

from collections.abc import Sequence

from cmcgns.data.sources.base import DEFAULT_VIEWS, FileSource, Reader, Source
from cmcgns.data.sources.detect import FORMATS, detect_format
from cmcgns.data.sources.mimic import MimicSource
from cmcgns.data.sources.open_i import OpenISource
from cmcgns.data.sources.pairs import PairsSource
from cmcgns.data.sources.phantom import PhantomSource, parse_phantom_uri
from cmcgns.data.sources.prepared import PreparedSource
from cmcgns.data.transforms import Target
from cmcgns.errors import UserError

__all__ = [
    "DEFAULT_VIEWS",
    "FORMATS",
    "FileSource",
    "MimicSource",
    "OpenISource",
    "PairsSource",
    "PhantomSource",
    "PreparedSource",
    "Reader",
    "Source",
    "detect_format",
    "open_source",
]


def open_source(
    uri: str,
    format: str = "auto",
    views: Sequence[str] = DEFAULT_VIEWS,
    seed: int = 0,
    target: Target | None = None,
    crop_borders: bool = True,
    phantom_studies: int = 4000,
    phantom_size: int = 256,
) -> Source:
    """The corpus at ``uri``; small enough to travel into every Ray task.

    ``target``: what films will be shrunk to, so that JPEGs may be decoded at a reduced scale of twice that.
    """
    if format == "auto":
        format = detect_format(uri)
    if format == "phantom":
        studies, phantom_seed = parse_phantom_uri(uri, phantom_studies, seed)
        return PhantomSource(studies, phantom_seed, phantom_size, phantom_size, crop_borders)
    if format == "parquet":
        return PreparedSource(uri, tuple(views))
    options = (tuple(views), seed, target, crop_borders)
    if format == "pairs-csv":
        return PairsSource.at(uri, *options)
    if format in ("mimic-cxr", "mimic-cxr-jpg"):
        return MimicSource(uri, format, *options)
    if format == "open-i":
        return OpenISource(uri, format, *options)
    raise UserError(f"data.format {format} is unknown; known are auto, {', '.join(FORMATS)}")
