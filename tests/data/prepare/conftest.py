"""A raw set with three broken films, and the set prepared from it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cmcgns.data.readers import open_source
from cmcgns.phantom import PhantomCorpus, write_pairs_csv
from tests.data.prepare.sets import STUDIES, prepare_here
from tests.ray_head import RayHead, connected


@pytest.fixture(scope="package")
def local_ray(ray_head: RayHead) -> Iterator[None]:
    """As the fixture of all folders, for as long as ``prepared`` is needed."""
    with connected(ray_head):
        yield


@pytest.fixture(scope="package")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with three broken films, one in a study with another film."""
    folder = tmp_path_factory.mktemp("raw")
    write_pairs_csv(PhantomCorpus(STUDIES, seed=3, height=160, width=128), folder)
    studies = open_source(str(folder)).index().table.to_pylist()
    alone = [study for study in studies if len(study["films"]) == 1][:2]
    pair = next(study for study in studies if len(study["films"]) == 2)
    (folder / alone[0]["films"][0]["path"]).write_bytes(b"")
    (folder / alone[1]["films"][0]["path"]).unlink()
    (folder / pair["films"][1]["path"]).write_bytes(b"GIF89a")
    return folder


@pytest.fixture(scope="package")
def prepared(local_ray: None, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "set"
    assert prepare_here(raw, out) == 0
    return out
