"""`jobs/prepare.py` to a local folder beside a bare loop of two processes that decodes, shrinks and encodes the same films.

Run alone: python -m tests.benchmarks.preparing. With numbers, such as 100000 1000000: so many tiny films prepared and checked,
each number in a process of its own.
"""

import contextlib
import io
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from cmcgns.cli import load_config
from cmcgns.data.decode import decode_image
from cmcgns.data.image import Target, shrink, without_borders
from cmcgns.data.manifest import read_manifest
from cmcgns.data.prepare.check import check_set
from cmcgns.data.prepare.config import PrepareConfig, PrepareJobConfig
from cmcgns.data.prepare.run import prepare
from cmcgns.data.prepare.shard import encode
from tests.benchmarks.corpora import many_rows, write_raw_films
from tests.benchmarks.measure import Line, interleaved, ratio_of_medians, where
from tests.benchmarks.streaming import local_ray

SIDE = 512


def prepare_film(path: Path) -> int:
    """What must be done for a film, and nothing else; the bytes that come out."""
    scan = decode_image(path.read_bytes(), path.name, Target(SIDE, "shorter"))
    return len(encode(shrink(without_borders(scan).grey_HW, SIDE), PrepareConfig(image_size=SIDE)))


def lines(films: int = 600, rounds: int = 3) -> list[Line]:
    """Films a second of both, interleaved."""
    with tempfile.TemporaryDirectory(prefix="cmcgns-bench-") as scratch, local_ray():
        raw = Path(scratch) / "raw"
        write_raw_films(raw, films)
        paths = sorted((raw / "images").iterdir())
        with ProcessPoolExecutor(2) as pool:

            def bare() -> None:
                assert sum(pool.map(prepare_film, paths, chunksize=4)) > 0

            def job() -> None:
                out = Path(scratch) / f"set-{time.monotonic_ns()}"
                settings = [f"--data.uri={raw}", f"--prepare.out={out}", "--data.group_studies=32"]
                with contextlib.redirect_stdout(io.StringIO()):
                    assert prepare(load_config(settings, PrepareJobConfig, None)) == 0
                assert read_manifest(str(out)).rows == films

            seconds = interleaved({"job": job, "bare": bare}, rounds, warm_up=1)
    share = 1 / ratio_of_medians(seconds, "job", "bare")
    speeds = {name: films / sorted(each)[len(each) // 2] for name, each in seconds.items()}
    measured = f"{share:.2f} ({speeds['job']:.0f} and {speeds['bare']:.0f} /s)"
    return [
        Line(f"prepare {films} JPEGs of 2500 x 3000, share of a bare loop's speed", measured, ">= 0.85", share >= 0.85)
    ]


@dataclass(frozen=True)
class Growth:
    """Films a second and the most memory of the driver, MiB."""

    films: int
    prepare_rate: float
    prepare_mib: float
    check_rate: float
    check_mib: float


def growth(films: int) -> Growth:
    """Prepare and check ``films`` films of 64 pixels."""
    with tempfile.TemporaryDirectory(prefix="cmcgns-bench-") as scratch:
        raw, out = many_rows(Path(scratch) / "raw", films), f"{scratch}/set"
        settings = [f"--data.uri={raw}", f"--prepare.out={out}", "--prepare.shard_mb=16"]
        found = []
        for action in (lambda: prepare(load_config(settings, PrepareJobConfig, None)), lambda: check_set(out)):
            with local_ray():
                began = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()):
                    assert action() == 0
                seconds = time.perf_counter() - began
            # of the whole process so far: the check comes second and may hold less
            found += [films / seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]
        return Growth(films, *found)


if __name__ == "__main__":
    print(where())
    sizes = [int(size) for size in sys.argv[1:]]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        print(*(processes.map(growth, sizes) if sizes else lines()), sep="\n")
