"""Training's stream waits while validation is read: it must leave room for it, or both would wait forever, and must stay
within its read-ahead limit."""

import time
from dataclasses import replace
from typing import Any

import pytest
import ray
from ray._private import internal_api

from cmcgns.cluster.coordinator import start_coordinator
from cmcgns.config import DataConfig
from cmcgns.data.blocks import blocks
from cmcgns.data.image import Target
from cmcgns.data.readers import open_index
from cmcgns.data.stream import DEALING_CPUS, Stream, bytes_per_study, stream_split
from cmcgns.data.studies import ListedStudies
from cmcgns.data.tokenizer import train_tokenizer
from tests.benchmarks.corpora import prepared_set

pytestmark = pytest.mark.ray

STUDIES, SIDE, BLOCK = 8_000, 48, 16
TAKEN_CPUS = 0.7
"""Of two: CPUs used by workers and pool of a small run."""
AHEAD = 2 * 512
PATIENCE_S = 90
STILL_S = 4


@pytest.fixture(scope="module")
def stream(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Stream:
    config = DataConfig(uri=prepared_set(tmp_path_factory.mktemp("prepared") / "set", STUDIES, SIDE), resize=SIDE)
    source, index = open_index("data.uri", config, Target(SIDE, "longer"))
    studies = ListedStudies(source, *source.arrange(index.split("train"), config.group_studies))
    words = train_tokenizer([("p", "nodule in the left lung"), ("p", "no effusion")] * 10, 256, 256, 32)
    coordinator = start_coordinator(STUDIES, 0.0, {})
    return stream_split(studies, words, config, coordinator, taken_cpus=TAKEN_CPUS, studies_ahead=AHEAD)


@ray.remote(num_cpus=0)
class Rank:
    """One rank's reader, in a process of its own: Ray stops a driver that reads while its Ray is shut down."""

    def __init__(self, part: Any) -> None:
        self.blocks = blocks(part, SIDE, BLOCK)

    def studies_of_next_block(self) -> int:
        return len(next(self.blocks))


def free_cpus_once_still() -> float:
    """Free CPUs of the cluster, after no change for ``STILL_S``."""
    end, since, before = time.monotonic() + PATIENCE_S, time.monotonic(), -1.0
    while time.monotonic() < min(end, since + STILL_S):
        free = ray.available_resources().get("CPU", 0.0)
        if free != before:
            since, before = time.monotonic(), free
        time.sleep(0.1)
    assert time.monotonic() < end
    return before


def held_bytes() -> int:
    """Bytes used in the object store of this machine."""
    node = ray.nodes()[0]
    stats = internal_api.node_stats(node["NodeManagerAddress"], node["NodeManagerPort"])
    return int(stats.store_stats.object_store_bytes_used)


def store_emptied() -> bool:
    """True once the objects of the previous test are gone."""
    end = time.monotonic() + PATIENCE_S
    while held_bytes() > 2 * 2**20 and time.monotonic() < end:
        time.sleep(0.1)
    return time.monotonic() < end


def test_two_waiting_epochs_stay_within_the_read_ahead_limit_and_use_no_cpu(stream: Stream) -> None:
    config = stream.config.model_copy(update={"cpus_per_task": DEALING_CPUS})
    stream = replace(stream, config=config, taken_cpus=1.6)
    assert store_emptied()
    before = held_bytes()
    begun = [Rank.remote(part) for epoch in (0, 1) for part in stream.split(epoch, 0, BLOCK, ranks=2)]
    read_a_block = lambda: ray.get([rank.studies_of_next_block.remote() for rank in begun])
    assert read_a_block() == [BLOCK] * len(begun)
    assert free_cpus_once_still() == ray.cluster_resources()["CPU"]
    # each may exceed it by the pieces of its tasks, because a started task reads to its end: four of 512 studies run at once, and
    # Ray Data may start a fifth before it has counted what the first has read (18 to 25 MB were held in four runs)
    most = 2 * (AHEAD + 5 * 512) * bytes_per_study(stream.config)
    assert held_bytes() - before < most < 2 * STUDIES * stream.config.resize**2
    # the epochs still continue: failed tasks would use no CPU either
    assert read_a_block() == [BLOCK] * len(begun)


def test_the_read_ahead_limit_never_stalls_two_ranks(stream: Stream) -> None:
    least = replace(stream, studies_ahead=8 * 2 * BLOCK + 512)  # eight rounds, and the piece of a task
    ranks = [Rank.remote(part) for part in least.split(0, 0, BLOCK, ranks=2)]
    began, studies = time.monotonic(), 0
    while studies < 2_000:
        studies += sum(ray.get([rank.studies_of_next_block.remote() for rank in ranks]))
        # a hang, not a speed: where a rank's hand did not fit, each one took up to a minute
        assert time.monotonic() - began < PATIENCE_S, studies
