"""The stream through Ray Data: exact blocks in the order of the index, bad rows recorded and skipped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cmcgns.cluster.coordinator import start_coordinator
from cmcgns.config import Config
from cmcgns.data.blocks import blocks
from cmcgns.data.stream import Stream, epoch_order, stream_split
from cmcgns.phantom import PhantomCorpus, write_pairs_csv
from cmcgns.train.setup import Corpus, make_tokenizer, open_corpus, sample_reports
from tests.small import small_config

pytestmark = pytest.mark.ray
BLOCK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus on disk of which three training films are broken in three ways."""
    folder = tmp_path_factory.mktemp("corpus")
    write_pairs_csv(PhantomCorpus(90, seed=3, height=48, width=48), folder)
    films = opened(folder)[1].train.table["films"].to_pylist()
    (folder / films[5][0]["path"]).write_bytes(b"")
    (folder / films[11][0]["path"]).write_bytes((folder / films[12][0]["path"]).read_bytes()[:200])
    for film in films[20]:
        (folder / film["path"]).unlink()
    return folder


def opened(folder: Path) -> tuple[Config, Corpus]:
    config = small_config(data__uri=str(folder), data__window_size=8, data__cpus_per_task=0.5, data__format="pairs-csv")
    return config, open_corpus(config)


def stream_of(folder: Path, max_bad_fraction: float) -> tuple[Stream, Any]:
    config, corpus = opened(folder)
    tokenizer = make_tokenizer(config, sample_reports(corpus, 1000))
    coordinator = start_coordinator(len(corpus.train), max_bad_fraction, {})
    return stream_split(corpus.train, tokenizer, config.data, coordinator), coordinator


def test_ranks_get_the_good_studies_of_the_order_block_by_block(local_ray: None, folder: Path) -> None:
    stream, coordinator = stream_of(folder, max_bad_fraction=0.2)
    bad_positions = set()
    for epoch, start in ((0, 0), (1, 10)):
        (iterator,) = stream.split(epoch, start, BLOCK, ranks=1)
        found = list(blocks(iterator, stream.config.resize, BLOCK))
        assert all(len(block) == BLOCK for block in found[:-1])
        positions = np.concatenate([block.positions for block in found])
        assert (np.diff(positions) > 0).all()
        order = epoch_order(stream.split_ref, stream.config.seed, epoch, stream.config.groups_per_window).row_S
        missing = sorted(set(range(start, stream.studies)) - set(positions.tolist()))
        bad_positions |= {int(order[place]) for place in missing}
        assert found[0].images_BRR.shape == (BLOCK, stream.config.resize, stream.config.resize)
        assert all(len(hashes) == max(owners) + 1 for hashes, owners in zip(
            found[0].sentence_hashes, found[0].sentence_of_token, strict=True
        ))  # fmt: skip
    account = ray.get(coordinator.account.remote())
    # a study with two films may use the good one: at most the three broken studies are missing
    assert bad_positions <= {5, 11, 20}
    assert 20 in bad_positions
    assert len(account["bad_rows"]) == len(bad_positions)
    assert "film file is missing" in account["bad_rows"].values()


def test_too_many_bad_studies_stop_the_stream_with_the_most_common_reasons(local_ray: None, folder: Path) -> None:
    stream, coordinator = stream_of(folder, max_bad_fraction=0.0)
    (iterator,) = stream.split(0, 0, BLOCK, ranks=1)
    with pytest.raises(Exception, match="max_bad_fraction"):
        list(blocks(iterator, stream.config.resize, BLOCK))
    failure = ray.get(coordinator.failure.remote())
    assert "data.max_bad_fraction 0.0" in failure
    assert "film file" in failure
