"""A training run out of a bucket, watched from outside: which objects it has asked for, and how much memory it holds."""

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from cmcgns.phantom import PhantomCorpus
from cmcgns.phantom.writers import write_pairs_csv
from tests.jobs import Job, result, rows
from tests.ray_head import MIB, RayHead
from tests.s3 import S3Server

FILM, STORED = 64, 160
"""Pixels of a film in the bucket, and of what the run makes of it: 25 KB, as much as a real film at 160."""
SETTLED = 0.5
"""Share of the steps after which memory counts as steady."""
LEAST_PAUSE_S = 0.5
"""Between samples of memory."""


def fill_bucket(server: S3Server, bucket: str, studies: int, scratch: Path, workers: int = 2) -> tuple[str, int]:
    """URI of a corpus of ``studies`` small phantom studies as pairs-csv, and its number of films."""
    uri = server.make_bucket(bucket) + "/corpus"
    write_pairs_csv(PhantomCorpus(studies, height=FILM, width=FILM), scratch, workers)
    return uri, server.upload(scratch, uri) - 1  # less the table


@dataclass(frozen=True)
class Watched:
    """What was seen of one run."""

    films: int
    """Films in the bucket."""
    films_before_first_step: int
    steady_mib: float
    """Median memory of the second half of the steps; NaN without a sample."""
    seconds: float
    folder: Path
    output: str
    memory: list[tuple[float, float]] = field(repr=False)
    """Seconds since the start and MiB."""

    @property
    def share_before_first_step(self) -> float:
        return self.films_before_first_step / self.films


def watch_run(
    head: RayHead, server: S3Server, uri: str, films: int, storage: Path, steps: int, *more: str, memory: bool = True
) -> Watched:
    """Train on the bucket for ``steps`` steps on the cluster ``head``, and watch; sampling ``memory`` slows the run."""
    start = time.time()
    job = Job(
        storage,
        f"--data.uri={uri}", "--data.format=pairs-csv", f"--data.resize={STORED}", "--data.validation_studies=32",
        f"--train.stage1_steps={steps}", "--train.stage2_steps=0", "--train.log_every=1", "--run.name=watched",
        f"--train.checkpoint_every={steps}", "--model.vocabulary_reports=1000", *more,
        env=head.environment,
    )  # fmt: skip
    folder = storage / "watched"
    watch = MemoryWatch(head, job) if memory else None
    job.wait_for(lambda: bool(rows(folder)))
    first_step = (folder / "metrics.jsonl").stat().st_mtime
    job.wait_for(lambda: len(rows(folder)) >= SETTLED * steps)
    settled = time.time()
    job.wait_for(lambda: len(rows(folder)) >= steps)
    ended = time.time()
    if watch is not None:
        watch.close()
    output = job.wait()
    assert job.process.returncode == 0, output[-3000:]
    assert result(folder)["status"] == "finished"
    samples = [] if watch is None else watch.samples
    steady = [mib for when, mib in samples if settled <= when <= ended]
    bucket = uri.removeprefix("s3://")
    return Watched(
        films,
        server.gets(f"{bucket}/images", until=first_step),
        float(np.median(steady)) if steady else float("nan"),
        time.time() - start,
        folder,
        output,
        [(when - start, mib) for when, mib in samples],
    )


class MemoryWatch:
    """Samples what the cluster and the driver hold: shared pages, the object store's too, are counted once."""

    def __init__(self, head: RayHead, job: Job) -> None:
        self.head, self.job = head, job
        self.samples: list[tuple[float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sampling."""
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        pause = LEAST_PAUSE_S
        while not self._done.wait(pause):
            began = time.time()
            self.samples.append((began, self.held_mib()))
            # a sample walks the pages of two dozen processes: it must not be what slows them
            pause = max(LEAST_PAUSE_S, 9 * (time.time() - began))

    def held_mib(self) -> float:
        """Proportional set sizes of all processes, MiB."""
        with suppress(psutil.NoSuchProcess):
            driver = psutil.Process(self.job.process.pid)
            return sum(map(pss, [*self.head.processes(), driver])) / MIB
        return 0.0


def pss(process: psutil.Process) -> int:
    """Bytes that would be free without the process: its own pages, and its part of those it shares."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
