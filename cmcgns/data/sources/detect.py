"""Which corpus layout lies at a URI, judged by a few file names."""

import fnmatch

from cmcgns.data import storage
from cmcgns.data.manifest import MANIFEST, PLAN
from cmcgns.errors import UserError

FORMATS = ("phantom", "pairs-csv", "mimic-cxr-jpg", "mimic-cxr", "open-i", "parquet")
MAX_DEPTH = 5
METADATA_TABLE = "mimic-cxr-*-metadata.csv*"


def detect_format(uri: str) -> str:
    """The name of the layout at ``uri``; ``UserError`` lists the known ones."""
    if uri == "phantom" or uri.startswith("phantom:"):
        return "phantom"
    if uri.endswith(".csv"):
        return "pairs-csv"
    names = storage.list_files(uri, recursive=False)
    if MANIFEST in names:
        return "parquet"
    if PLAN in names:
        raise UserError(
            f"{uri} is half prepared; go on with python jobs/prepare.py --prepare.out={uri} and its settings"
        )
    if "pairs.csv" in names:
        return "pairs-csv"
    example = _first_file(uri, (".jpg", ".jpeg", ".dcm", ".xml"))
    if fnmatch.filter(names, METADATA_TABLE):
        return "mimic-cxr" if example.endswith(".dcm") else "mimic-cxr-jpg"
    if example.endswith(".xml") or any(name.endswith(".xml") for name in names):
        return "open-i"
    if example.endswith(".dcm"):
        return "mimic-cxr"
    raise UserError(
        f"{uri}: no corpus is recognised. Known are pairs-csv (a pairs.csv), mimic-cxr-jpg ({METADATA_TABLE} and "
        "files/), mimic-cxr (folders of .dcm), open-i (.xml reports), parquet (prepared: manifest.json); or give data.format"
    )


def _first_file(uri: str, suffixes: tuple[str, ...], depth: int = 0) -> str:
    """One film or report among the first folders: a corpus of 300,000 files is not listed for its name."""
    for name in storage.list_files(uri, recursive=False):
        if name.lower().endswith(suffixes):
            return name.lower()
    if depth < MAX_DEPTH:
        for folder in storage.list_folders(uri)[:3]:
            found = _first_file(storage.join(uri, folder), suffixes, depth + 1)
            if found:
                return found
    return ""
