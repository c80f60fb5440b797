"""The stream beside a torch DataLoader of two workers that does the same work: raw films out of S3, and prepared sets, these also
beside two threads that decode the films and do nothing else.

Run alone: python -m tests.benchmarks.streaming [raw] [prepared] [memory] [manifest]
"""

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import psutil
import pyarrow.parquet as pq
import ray
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cmcgns.cluster.coordinator import start_coordinator
from cmcgns.cluster.session import ray_session
from cmcgns.config import DataConfig
from cmcgns.data.image import Target
from cmcgns.data.order import drawn_image
from cmcgns.data.readers import Source, open_index
from cmcgns.data.record import StreamStudy
from cmcgns.data.stream import Stream, default_read_ahead, read_study, stream_split
from cmcgns.data.studies import ListedStudies
from cmcgns.data.tokenizer import ReportTokenizer, train_tokenizer
from cmcgns.train.steps import STEPS_AHEAD, PrefetchTimer, Stretch
from cmcgns.train.worker import RayBlocks
from tests.benchmarks.corpora import many_rows, prepared_set, raw_films
from tests.benchmarks.measure import Line, where
from tests.streaming import pss

BLOCK = 16
"""Studies of a microbatch."""
LOADER_WORKERS = 2
MIB = 2**20
EPOCHS = 3
SAMPLE_S = 1.0
"""Between samples of memory: each one walks the pages of two dozen processes, and slows them."""


@dataclass(frozen=True)
class Contest:
    """One corpus, read by both."""

    source: Source
    studies: ListedStudies
    tokenizer: ReportTokenizer
    config: DataConfig


def open_contest(uri: str, **settings: Any) -> Contest:
    """The training split of the corpus at ``uri``; words are the tokens of a vocabulary of its own."""
    # a task for each core, as the DataLoader has a worker: no training holds any
    config = DataConfig(uri=uri, cpus_per_task=1, **settings)
    source, index = open_index("data.uri", config, Target(config.resize, "longer"))
    table, arrangement = source.arrange(index.split("train"), config.group_studies)
    studies = ListedStudies(source, table.combine_chunks(), arrangement)
    [(sample, reader_of)] = studies.samples(400)
    reader = reader_of([study["films"][0]["path"] for study in sample])
    reports = [reader.read_sentences(study, study["films"][0]["path"]) for study in sample]
    words = train_tokenizer((("p", sentence) for report in reports for sentence in report.sentences), 4096, 256, 32)
    return Contest(source, studies, words, config)


def ready_coordinator(contest: Contest) -> Any:
    """What keeps the list of bad rows; a run has it long before its data start."""
    coordinator = start_coordinator(len(contest.studies), 0.0, {})
    ray.get(coordinator.account.remote())
    return coordinator


class OurEpochs:
    """Epochs as a training rank gets them: the next one is begun while this one ends."""

    def __init__(self, contest: Contest, coordinator: Any = None) -> None:
        coordinator = coordinator or ready_coordinator(contest)
        ahead = default_read_ahead(contest.source, contest.config, len(contest.studies), 64, decoders=2)
        self.stream: Stream = stream_split(
            contest.studies, contest.tokenizer, contest.config, coordinator, studies_ahead=ahead
        )
        self.blocks = RayBlocks(self.stream, self.stream, BLOCK)
        self.epoch = 0
        self.timer = PrefetchTimer(self.stream.studies, STEPS_AHEAD * BLOCK)

    def __call__(self) -> int:
        studies = 0
        self.timer.start(self.stream.studies)
        for block in self.blocks.open(self.whole(self.epoch)):
            studies += len(block)
            if self.timer.is_due(studies):
                self.blocks.prepare(self.whole(self.epoch + 1))
        self.epoch += 1
        return studies

    def whole(self, epoch: int, position: int = 0) -> Stretch:
        """``epoch`` from ``position`` on."""
        return Stretch(epoch, position, self.stream.studies)

    def close(self) -> None:
        """Leave the epoch that was begun last."""
        self.blocks.close()
        # Ray Data's threads notice after 0.1 s; Ray ends a process whose threads meet its shutdown
        time.sleep(0.5)


class LoaderStudies(IterableDataset[Any]):
    """The same studies in the same order for a worker of a DataLoader: every second piece of the order."""

    def __init__(self, contest: Contest) -> None:
        self.contest, self.epoch = contest, 0
        self.stream = Stream(contest.source, None, len(contest.studies), contest.tokenizer, contest.config, None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        config = self.contest.config
        order = self.contest.studies.epoch(config.seed, self.epoch, config.groups_per_window)
        size = len(order.row_S)
        bounds = (
            order.starts if self.contest.source.in_groups else np.append(np.arange(0, size, config.window_size), size)
        )
        for number in range(info.id, len(bounds) - 1, info.num_workers):
            yield from self.batches(order.row_S[bounds[number] : bounds[number + 1]])
        self.epoch += 1

    def batches(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        config, source = self.contest.config, self.contest.source
        studies = self.contest.studies.table.take(rows).to_pylist()
        shown = [drawn_image(config.seed, self.epoch, study["study_id"], len(study["films"])) for study in studies]
        reader = source.reader([study["films"][film]["path"] for study, film in zip(studies, shown, strict=True)])
        for start in range(0, len(studies), BLOCK):
            part = slice(start, start + BLOCK)
            read = [
                read_study(study, film, reader, self.stream, self.epoch)
                for study, film in zip(studies[part], shown[part], strict=True)
            ]
            good = [study for study in read if isinstance(study, StreamStudy)]
            flat = {
                "tokens": [study.tokens_T for study in good],
                "owners": [study.sentence_of_token_T for study in good],
                "hashes": [np.array(study.sentence_hashes) for study in good],
            }
            # few large tensors: each one that crosses to the main process costs as much as decoding a small film
            yield {
                "images": torch.from_numpy(np.stack([study.image_RR for study in good])),
                "lengths": torch.tensor([[len(part) for part in parts] for parts in flat.values()]),
            } | {name: torch.from_numpy(np.concatenate(parts)) for name, parts in flat.items()}


class LoaderEpochs:
    """Epochs of a DataLoader whose workers stay."""

    def __init__(self, contest: Contest) -> None:
        self.loader = DataLoader(
            LoaderStudies(contest),
            batch_size=None,
            num_workers=LOADER_WORKERS,
            persistent_workers=True,
            prefetch_factor=4,
        )

    def __call__(self) -> int:
        return sum(len(batch["images"]) for batch in self.loader)


class DecodedEpochs:
    """Films of a prepared set in a folder, read by row group and decoded by as many threads: no ids, texts, checks or blocks."""

    def __init__(self, contest: Contest) -> None:
        shards = sorted(Path(contest.config.uri).glob("train-*.parquet"))
        self.groups = [(shard, number) for shard in shards for number in range(pq.read_metadata(shard).num_row_groups)]

    def __call__(self) -> int:
        with ThreadPoolExecutor(LOADER_WORKERS) as threads:
            return sum(threads.map(self.decode, self.groups))

    def decode(self, place: tuple[Path, int]) -> int:
        shard, number = place
        with pq.ParquetFile(shard) as file:
            films = file.read_row_group(number, columns=["image"])["image"].to_pylist()
        return sum(cv2.imdecode(np.frombuffer(film, np.uint8), cv2.IMREAD_UNCHANGED).ndim == 2 for film in films)


def race(contest: Contest, rounds: int, **others: Callable[[], int]) -> dict[str, list[float]]:
    """Studies a second by contender, with ``others``, over ``EPOCHS`` epochs in a row, the contenders in turn.

    Neither reads while it is the other's turn. An epoch before those that count leaves as much read ahead as they will.
    """
    others = {"loader": LoaderEpochs(contest), **others}
    found: dict[str, list[float]] = {name: [] for name in ("ours", *others)}
    for _ in range(rounds):
        ours = OurEpochs(contest)
        found["ours"].append(speed(ours, contest))
        ours.close()
        for name, other in others.items():
            found[name].append(speed(other, contest))
    return found


def speed(epoch: Callable[[], int], contest: Contest) -> float:
    """Studies a second, from the second epoch on."""
    epoch()
    began = time.perf_counter()
    for _ in range(EPOCHS):
        studies = epoch()
        assert studies == len(contest.studies), (type(epoch).__name__, studies)
    return EPOCHS * len(contest.studies) / (time.perf_counter() - began)


@contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of this machine as a job makes it."""
    with ray_session({"OMP_NUM_THREADS": "1"}):
        yield


def raw_lines(uri: str, rounds: int = 3) -> list[Line]:
    """Raw films of 2500 x 3000 out of S3."""
    contest = open_contest(uri, resize=256, window_size=16)
    found = race(contest, rounds)
    return [_beside(f"raw JPEG 2500 x 3000 from S3, epochs of {len(contest.studies)}", found, 0.80)]


def prepared_lines(uri: str, rounds: int = 3) -> list[Line]:
    """A prepared set of 256 pixels."""
    contest = open_contest(uri, resize=256)
    found = race(contest, rounds, decoding=DecodedEpochs(contest))
    ours, limit = median(found["ours"]), median(found["decoding"])
    return [
        _beside(f"prepared, 256 pixels, epochs of {len(contest.studies)}", found, 0.55),
        Line(
            "the same: share of two threads that only decode",
            f"{ours / limit:.2f} ({limit:.0f} /s)",
            ">= 0.9",
            ours >= 0.9 * limit,
        ),
        Line("the same in studies a second", f"{ours:.0f}", ">= 1800", ours >= 1800),
    ]


def _beside(what: str, found: dict[str, list[float]], wanted: float) -> Line:
    ours, loader = median(found["ours"]), median(found["loader"])
    measured = f"{ours / loader:.2f} ({ours:.0f} and {loader:.0f} /s)"
    return Line(f"{what}: share of a DataLoader's speed", measured, f">= {wanted}", ours / loader >= wanted)


def manifest_lines(folder: Path, rows: int = 377_110, last: int = 20_000) -> list[Line]:
    """A manifest as long as MIMIC-CXR's: until the first microbatch, and from the last one of an epoch to the next."""
    contest = open_contest(str(many_rows(folder, rows)), resize=64)
    with local_ray():
        coordinator = ready_coordinator(contest)
        began = time.perf_counter()
        ours = OurEpochs(contest, coordinator)
        next(ours.blocks.open(ours.whole(0)))
        first = time.perf_counter() - began
        ours.close()
    with local_ray():
        ours, start, studies = OurEpochs(contest), len(contest.studies) - last, 0
        for block in ours.blocks.open(ours.whole(1, start)):
            studies += len(block)
            if ours.timer.is_due(start + studies):
                ours.blocks.prepare(ours.whole(2))
        assert studies == last
        ended = time.perf_counter()
        next(ours.blocks.open(ours.whole(2)))
        second = time.perf_counter() - ended
        ours.close()
    return [
        Line(f"manifest of {rows} rows: first microbatch", f"{first:.1f} s", "<= 10", first <= 10),
        Line("from the end of an epoch to the next one's first microbatch", f"{second:.2f} s", "<= 2", second <= 2),
    ]


def memory_lines(scratch: Path, sizes: tuple[int, int] = (5_000, 20_000)) -> list[Line]:
    """Peak memory over three epochs of a prepared set, for both sizes: what it takes beside an idle Ray and driver, and all."""
    uris = [prepared_set(scratch / f"of{studies}", studies) for studies in sizes]
    # each in a process of its own: one that has held a Ray before is larger
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        found = list(processes.map(held_and_peak_mib, uris, sizes))
    lines = []
    for size, (before, peak) in zip(sizes, found, strict=True):
        what, measured = (
            f"peak memory of the stream, {size} studies (with all)",
            f"{peak - before:.0f} MiB ({peak:.0f})",
        )
        lines.append(Line(what, measured, "<= 1500 MB", (peak - before) * MIB <= 1.5e9))
    ratio = found[1][1] / found[0][1]
    return [*lines, Line("the larger beside the smaller, with all", f"{ratio:.2f}", "<= 1.1", ratio <= 1.1)]


def held_and_peak_mib(uri: str, studies: int) -> tuple[float, float]:
    """Memory of driver and Ray while idle, and the most over three epochs, MiB."""
    with local_ray():
        contest = open_contest(uri, resize=256)
        idle = held_mib()
        ours = OurEpochs(contest)
        watch = Watch()
        for _ in range(3):
            assert ours() == studies
        ours.close()
        return idle, watch.end()


class Watch:
    """Samples ``held_mib`` until ``end``."""

    def __init__(self) -> None:
        self._peak, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self._peak = max(self._peak, held_mib())

    def end(self) -> float:
        """The greatest sample."""
        self._done.set()
        self._thread.join()
        return self._peak


def held_mib() -> float:
    """Memory of this process and of all that it has started, shared pages counted once, MiB."""
    own = psutil.Process()
    return sum(map(pss, [own, *own.children(recursive=True)])) / MIB


def lines(
    studies: int = 16_000, films: int = 240, rounds: int = 3, what: tuple[str, ...] = ("raw", "prepared")
) -> list[Line]:
    """Both contests, on corpora made for them."""
    found: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="cmcgns-bench-") as scratch:
        if "prepared" in what:
            uri = prepared_set(Path(scratch) / "prepared", studies)
            with local_ray():
                found += prepared_lines(uri, rounds)
        if "manifest" in what:
            found += manifest_lines(Path(scratch) / "manifest")
        if "memory" in what:
            found += memory_lines(Path(scratch))
        if "raw" in what:
            with raw_films(Path(scratch), films) as uri, local_ray():
                found += raw_lines(uri, rounds)
    return found


if __name__ == "__main__":
    print(where())
    chosen = tuple(sys.argv[1:]) or ("raw", "prepared", "memory", "manifest")
    print(*lines(what=chosen), sep="\n")
