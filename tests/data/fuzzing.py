"""Mutated inputs: DICOM, PNG, JPEG, TIFF, tables and reports with flipped bytes, swapped lengths and cuts, by a seed."""

import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmcgns.data.decode import decode_image
from cmcgns.data.readers import open_source
from cmcgns.data.reports import parse_report
from cmcgns.data.text import decode_text
from cmcgns.errors import BadRow, UserError
from tests.data.coded_films import LOSSLESS, baseline, coded, jpeg, shot
from tests.data.test_damaged_dicoms import with_icon
from tests.data.test_dicom import film, written
from tests.data.test_odd_pictures import png, tiff

HEAD = 2048
"""Bytes in which most flips are, because headers are there."""
MOST_BYTES = 2**29
"""Of memory for one input: the budget of a decoding task."""
REPORT = (
    "FINDINGS:_x000D_\nThe lungs are clear \\n &lt;br&gt; \\.br\\ Épanchement.\nIMPRESSON: No acute disease, 2.5 cm.\n"
)
TABLE = (
    'image,report,patient\na.png,"The ""large"" lungs, clear.\nSecond line.",p1\n'
    'b.png,"It is new",p2\nc.png,Épanchement,\\N\n'
)


@cache
def sound() -> tuple[tuple[str, bytes], ...]:
    """One sound input of each kind."""
    grey = (shot() // 16).astype(np.uint8)
    found = [("dicom", written(coded(shot(), syntax, 12))) for syntax in LOSSLESS]
    found += [("dicom", written(baseline(grey))), ("dicom", with_icon(coded(shot(), LOSSLESS[2], 12)))]
    found += [("dicom", written(film(shot(), RescaleSlope=1, RescaleIntercept=0, WindowCenter=2048, WindowWidth=4096)))]
    found += [("picture", png(grey)), ("picture", png(np.dstack([shot()] * 3))), ("picture", jpeg(grey))]
    found += [("picture", tiff(shot(), 0)), ("picture", tiff(np.dstack([shot()] * 3), 2, ">"))]
    found += [("report", REPORT.encode()), ("report", REPORT.encode("utf-16")), ("table", TABLE.encode())]
    return tuple(found)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """``data`` with one to four faults."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if len(changed) < 8:
            break
        at = int(rng.integers(0, min(len(changed), HEAD) if rng.random() < 0.7 else len(changed)))
        kind = rng.integers(0, 6)
        if kind == 0:
            changed[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            changed[at : at + 4] = rng.integers(0, 256, 4, np.uint8).tobytes()
        elif kind == 2:
            changed[at : at + 4] = b"\xff\xff\xff\xff" if rng.random() < 0.5 else b"\0\0\0\0"
        elif kind == 3:
            del changed[at + 8 :]
        elif kind == 4:
            del changed[at : at + int(rng.integers(1, 64))]
        else:
            changed[at:at] = changed[at : at + int(rng.integers(1, 64))]
    return bytes(changed)


def outcome(kind: str, data: bytes, read_table: Callable[[bytes], object]) -> str:
    """``read`` or ``refused``; any other error is raised."""
    try:
        if kind in ("dicom", "picture"):
            decode_image(data, "film.dcm" if kind == "dicom" else "film.png")
        elif kind == "report":
            parse_report(decode_text(data))
        else:
            read_table(data)
    except (BadRow, UserError):
        return "refused"
    return "read"


def case(seed: int) -> tuple[str, bytes]:
    """The mutated input number ``seed``."""
    kind, data = sound()[seed % len(sound())]
    return kind, mutated(data, np.random.default_rng(seed))


class Fuzzed(NamedTuple):
    """What a range of seeds came to."""

    outcomes: Counter[str]
    """By kind and outcome, such as ``dicom refused``."""
    slowest: tuple[float, int]
    """Seconds, seed."""
    largest: tuple[int, int]
    """Bytes of memory beyond those before, seed."""


def fuzz(seeds: range, folder: Path) -> Fuzzed:
    """Read the mutated inputs of ``seeds``; an error names its seed."""

    def read_table(data: bytes) -> object:
        (folder / "pairs.csv").write_bytes(data)
        return open_source(str(folder), format="pairs-csv").index()

    outcomes: Counter[str] = Counter()
    slowest, largest = (0.0, -1), (0, -1)
    for seed in seeds:
        kind, data = case(seed)
        memory, began = memory_bytes("VmRSS"), time.perf_counter()
        reset_peak()
        try:
            outcomes[f"{kind} {outcome(kind, data, read_table)}"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed} ({kind}): {error!r}") from error
        slowest = max(slowest, (time.perf_counter() - began, seed))
        largest = max(largest, (memory_bytes("VmHWM") - memory, seed))
    return Fuzzed(outcomes, slowest, largest)


def reset_peak() -> None:
    """Set VmHWM to the memory in use now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
