"""The stream gives the good studies in the order of the epoch, in global batches that do not depend on the workers."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from cmcgns.cluster.coordinator import start_coordinator
from cmcgns.config import Config
from cmcgns.data import readers
from cmcgns.data.blocks import blocks, deal
from cmcgns.data.readers import open_source
from cmcgns.data.record import FACTS, NO_LABELS, StreamStudy, stream_table
from cmcgns.data.stream import Stream, stream_split
from cmcgns.phantom import PhantomCorpus, write_pairs_csv
from cmcgns.train.setup import make_tokenizer, open_corpus, sample_reports
from tests.data.prepare.sets import prepare_here
from tests.small import small_config

STUDIES, GROUP, WINDOW, GLOBAL = 200, 16, 3, 24


def numbered(rows: int) -> pa.Table:
    """Rows whose position and image are their number."""
    studies = [
        StreamStudy(
            (number + 1) * 3**35, np.full((2, 2), number, np.uint8), np.arange(3, dtype=np.int32), np.zeros(3, np.int16),
            [1] * (1 + number % 3), 2, NO_LABELS, [],
        )
        for number in range(rows)
    ]  # fmt: skip
    return stream_table(range(rows), studies, 2)


@pytest.mark.parametrize("rows", [1, 7, 24, 30, 48])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_blocks_are_dealt_round_the_ranks(rows: int, ranks: int) -> None:
    """Against dealing them one after another."""
    size = 4
    wanted: list[list[int]] = [[] for _ in range(ranks)]
    for number, start in enumerate(range(0, rows, size)):
        wanted[number % ranks] += range(start, min(start + size, rows))
    dealt = deal(numbered(rows), ranks, size, rounds=12)
    assert len(dealt) == ranks * size * 12
    parts = np.array(dealt["position"]).reshape(ranks, -1)
    assert [[place for place in part if place >= 0] for part in parts.tolist()] == wanted
    films = [
        film[0]
        for film, place in zip(dealt["image"].to_pylist(), dealt["position"].to_pylist(), strict=True)
        if place >= 0
    ]
    assert films == [place for part in wanted for place in part]


class Dealt:
    """Rows as one rank's Ray Data iterator gives them."""

    def __init__(self, rows: pa.Table) -> None:
        self.rows = rows

    def iter_batches(self, **_: Any) -> Any:
        return iter([self.rows])


@pytest.mark.parametrize("rows", [1, 7, 24, 30, 48])
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_is_told_of_the_blocks_of_all_ranks(rows: int, ranks: int) -> None:
    """Against what each rank finds in its own blocks."""
    dealt = deal(numbered(rows), ranks, 4, rounds=12)
    cut = len(dealt) // ranks
    of_rank = [list(blocks(Dealt(dealt.slice(cut * rank, cut)), 2, 4)) for rank in range(ranks)]
    for number in range(max(map(len, of_rank))):
        together = [each[number] for each in of_rank if number < len(each)]
        for block in together:
            assert block.facts_W5.shape == (ranks, len(FACTS))
            assert block.facts_W5[: len(together)].tolist() == [each.facts_5.tolist() for each in together]
            assert not block.facts_W5[len(together) :, FACTS.index("studies")].any()
    assert sum(int(block.facts_5[0]) for each in of_rank for block in each) == rows


@pytest.fixture(scope="module")
def corpora(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A raw set with some broken films, and the set prepared from it."""
    raw = tmp_path_factory.mktemp("raw")
    write_pairs_csv(PhantomCorpus(STUDIES, seed=9, height=64, width=64), raw)
    alone = [s for s in open_source(str(raw)).index().split("train").to_pylist() if len(s["films"]) == 1]
    for study in alone[3:60:9]:
        (raw / study["films"][0]["path"]).write_bytes(b"")
    out = tmp_path_factory.mktemp("prepared") / "set"
    assert prepare_here(raw, out) == 0
    return {"raw": raw, "prepared": out}


def stream_of(folder: Path, format: str) -> Stream:
    config: Config = small_config(
        data__uri=str(folder), data__window_size=8, data__group_studies=GROUP, data__groups_per_window=WINDOW,
        data__format=format, data__max_bad_fraction=0.2,
    )  # fmt: skip
    corpus = open_corpus(config)
    coordinator = start_coordinator(len(corpus.train), 0.2, {})
    tokenizer = make_tokenizer(config, sample_reports(corpus, 1000))
    return stream_split(corpus.train, tokenizer, config.data, coordinator)


def global_batches(stream: Stream, epoch: int, position: int, ranks: int, end: int | None = None) -> list[set[int]]:
    """The draw keys of each full global batch, from ranks that take their blocks in turn."""
    iterators = stream.split(epoch, position, GLOBAL // ranks, ranks, end)
    readers = [reading.remote(iterator, stream.config.resize, GLOBAL // ranks) for iterator in iterators]
    of_rank = ray.get(readers)
    steps = min(len(found) for found in of_rank)
    found = [[found[step] for found in of_rank] for step in range(steps)]
    return [set(chain.from_iterable(parts)) for parts in found if all(len(part) == GLOBAL // ranks for part in parts)]


@ray.remote(num_cpus=0)
def reading(iterator: Any, resize: int, size: int) -> list[list[int]]:
    """The keys of each block of a rank."""
    return [block.draw_keys.tolist() for block in blocks(iterator, resize, size)]


@pytest.mark.ray
def test_global_batches_are_the_same_on_any_number_of_workers_raw_or_prepared(corpora: dict[str, Path]) -> None:
    raw, prepared = stream_of(corpora["raw"], "pairs-csv"), stream_of(corpora["prepared"], "parquet")
    for epoch, others in ((0, ((raw, 2), (prepared, 3))), (1, ((prepared, 1),))):
        wanted = global_batches(raw, epoch, 0, 1)
        assert len(wanted) >= 5
        assert len(set().union(*wanted)) == GLOBAL * len(wanted)
        for stream, ranks in others:
            assert global_batches(stream, epoch, 0, ranks) == wanted, (stream.source.format, ranks)


@pytest.mark.ray
def test_a_large_prepared_set_gives_the_same_batches_also_part_by_part(
    corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = stream_of(corpora["prepared"], "parquet")
    monkeypatch.setattr(readers, "LISTED_STUDIES", 0)
    large = stream_of(corpora["prepared"], "parquet")
    wanted = global_batches(listed, 1, 0, 1)
    assert len(wanted) >= 5
    assert global_batches(large, 1, 0, 2, 2 * GLOBAL) + global_batches(large, 1, 2 * GLOBAL, 3) == wanted


@pytest.mark.ray
def test_a_restart_within_an_epoch_continues_with_the_same_batches(corpora: dict[str, Path]) -> None:
    stream = stream_of(corpora["prepared"], "parquet")
    (iterator,) = stream.split(2, 0, GLOBAL, 1)
    whole = list(blocks(iterator, stream.config.resize, GLOBAL))
    after = int(whole[1].positions[-1]) + 1
    wanted = [set(block.draw_keys.tolist()) for block in whole[2:] if len(block) == GLOBAL]
    assert global_batches(stream, 2, after, 2) == wanted
