"""Prepared sets of 1, 10 and 100 million studies: what driver and tasks hold, and how long a run waits for its studies.

The sets have tiny films, and most shards are links to a few (``tests/data/large_sets.py``): order, manifest and row groups are
those of a set of their size. The driver here is rank 0 as well, and reads its steps as training does.
"""

import contextlib
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context

import psutil
import pytest
import torch

from cmcgns.cluster.coordinator import start_coordinator
from cmcgns.data.batch import Batcher
from cmcgns.data.stream import stream_split
from cmcgns.train.setup import make_tokenizer, open_corpus, sample_reports
from cmcgns.train.steps import Cursor, StepReader
from cmcgns.train.worker import RayBlocks
from tests.benchmarks.streaming import local_ray
from tests.data.large_sets import large_set
from tests.small import small_config
from tests.streaming import pss

pytestmark = pytest.mark.ray

STUDIES = {"1 M": 10**6, "10 M": 10**7, "100 M": 10**8}
BATCH = 64
TAIL = 30_000
"""Studies before the end of an epoch from which it is read."""
STRETCH = 30_016
MIB = 2**20
FREE_BYTES = 3 * 2**30


@dataclass(frozen=True)
class Figures:
    """Seconds and MiB of one set."""

    open_s: float
    """Manifest, order and sample of reports."""
    first_s: float
    """From nothing but a running cluster to the first step's studies."""
    resume_s: float
    """To the first step in the middle of an epoch."""
    next_epoch_s: float
    """From the last step of an epoch to the first of the next."""
    next_stretch_s: float
    """From the last step of a stretch of an epoch to the first of the next."""
    driver_mib: float
    task_mib: float


def seconds_to_pass(reader: StepReader, epoch: int, position: int) -> float:
    """Seconds from the last step before this place to the first one behind it."""
    last = time.monotonic()
    while True:
        cursor = reader.next_step().cursor
        now = time.monotonic()
        if (cursor.epoch, cursor.position) > (epoch, position):
            return now - last
        last = now


def measure(uri: str) -> Figures:
    """The figures of the set at ``uri``, in a process of its own."""
    config = small_config(
        data__uri=uri, data__resize=8, data__image_size=8, model__vocabulary_reports=1000, num_workers=1,
        microbatch_size=BATCH, global_batch_size=BATCH,
    )  # fmt: skip
    with local_ray():
        began = time.monotonic()
        corpus = open_corpus(config)
        words = make_tokenizer(config, sample_reports(corpus, config.model.vocabulary_reports))
        open_s = time.monotonic() - began
        coordinator = start_coordinator(corpus.studies, 0.0, {})
        stream = stream_split(corpus.train, words, config.data, coordinator)
        blocks, studies = RayBlocks(stream, stream, BATCH), len(corpus.train)

        def reader_from(epoch: int, position: int) -> StepReader:
            blocks.close()
            return StepReader(
                blocks, Batcher(config, words.pad_id, torch.device("cpu")), Cursor(epoch, position), 1, lambda: False
            )

        with peak_of_tasks() as task_mib:
            reader = reader_from(0, 0)
            digests = [reader.next_step().studies_digest]
            first_s = time.monotonic() - began
            digests += [reader.next_step().studies_digest for _ in range(3)]
            reader = reader_from(0, 2 * BATCH)
            assert [reader.next_step().studies_digest for _ in range(2)] == digests[2:]
            began = time.monotonic()
            reader_from(3, studies // 2 + 77).next_step()
            resume_s = time.monotonic() - began
            next_epoch_s = seconds_to_pass(reader_from(0, studies - TAIL), 1, 0)
            blocks.at_once = STRETCH
            next_stretch_s = seconds_to_pass(reader_from(0, 0), 0, STRETCH)
        blocks.close()
        time.sleep(0.5)  # Ray Data's threads end
        driver_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return Figures(open_s, first_s, resume_s, next_epoch_s, next_stretch_s, driver_mib, max(task_mib))


@contextlib.contextmanager
def peak_of_tasks() -> Iterator[list[float]]:
    """Samples of the most memory of a task's process meanwhile, shared pages by share, MiB."""
    samples, ended = [0.0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "read_pieces" in "".join(process.cmdline()):
                        samples.append(pss(process) / MIB)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Figures]:
    folder = tmp_path_factory.mktemp("sets")
    if shutil.disk_usage(folder).free < FREE_BYTES:
        pytest.skip(f"{folder} has less than {FREE_BYTES / 2**30:.0f} GiB free")
    found = {}
    for name, studies in STUDIES.items():
        uri = large_set(folder / name.replace(" ", ""), studies)
        # a process of its own: the most that it held is its own
        with ProcessPoolExecutor(1, get_context("spawn")) as processes:
            found[name] = processes.submit(measure, uri).result()
        shutil.rmtree(uri)
    columns = [field.name for field in fields(Figures)]
    print("\nstudies", *(f"{column:>14}" for column in columns))
    for name, each in found.items():
        print(f"{name:>7}", *(f"{getattr(each, column):14.1f}" for column in columns))
    return found


def test_the_driver_holds_less_than_2_gib_at_100_million_studies(figures: dict[str, Figures]) -> None:
    assert figures["100 M"].driver_mib < 2048


def test_the_first_studies_come_within_30_s_at_100_million(figures: dict[str, Figures]) -> None:
    assert figures["100 M"].first_s < 30


def test_a_task_holds_as_much_of_a_hundred_times_the_studies(figures: dict[str, Figures]) -> None:
    assert figures["100 M"].task_mib < figures["1 M"].task_mib + 100


def test_a_restart_in_the_middle_takes_no_longer_than_a_start(figures: dict[str, Figures]) -> None:
    assert figures["100 M"].resume_s < 30


def test_the_next_epoch_and_the_next_part_of_an_epoch_are_ready_when_they_are_needed(
    figures: dict[str, Figures],
) -> None:
    assert figures["100 M"].next_epoch_s < 5
    assert figures["100 M"].next_stretch_s < 5


def test_what_the_driver_holds_grows_by_less_than_ten_bytes_a_study(figures: dict[str, Figures]) -> None:
    grown = (figures["100 M"].driver_mib - figures["1 M"].driver_mib) * MIB
    assert grown < 10 * (STUDIES["100 M"] - STUDIES["1 M"])
