"""Every corpus behind one protocol: an index of its studies, then films and reports one at a time."""

from collections.abc import Sequence

from cmcgns.data.sources.base import DEFAULT_VIEWS, FileSource, Source
from cmcgns.data.sources.detect import FORMATS, detect_format
from cmcgns.data.sources.mimic import MimicSource
from cmcgns.data.sources.open_i import OpenISource
from cmcgns.data.sources.pairs import PairsSource
from cmcgns.data.sources.phantom import PhantomSource, parse_phantom_uri
from cmcgns.errors import UserError

__all__ = [
    "DEFAULT_VIEWS",
    "FORMATS",
    "FileSource",
    "MimicSource",
    "OpenISource",
    "PairsSource",
    "PhantomSource",
    "Source",
    "detect_format",
    "open_source",
]


def open_source(
    uri: str,
    format: str = "auto",
    views: Sequence[str] = DEFAULT_VIEWS,
    seed: int = 0,
    at_least: int | None = None,
    phantom_studies: int = 4000,
    phantom_size: int = 256,
) -> Source:
    """The corpus at ``uri``; small enough to travel into every Ray task.

    ``at_least``: films will be shrunk to this side, so JPEGs may be decoded at a reduced scale of twice that.
    """
    if format == "auto":
        format = detect_format(uri)
    if format == "phantom":
        studies, phantom_seed = parse_phantom_uri(uri, phantom_studies, seed)
        return PhantomSource(studies=studies, seed=phantom_seed, height=phantom_size, width=phantom_size)
    if format == "pairs-csv":
        return PairsSource.at(uri, tuple(views), seed, at_least)
    if format in ("mimic-cxr", "mimic-cxr-jpg"):
        return MimicSource(uri, format, tuple(views), seed, at_least)
    if format == "open-i":
        return OpenISource(uri, format, tuple(views), seed, at_least)
    raise UserError(f"data.format {format} is unknown; known are auto, {', '.join(FORMATS)}")
