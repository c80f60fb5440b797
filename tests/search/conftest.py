"""An index and the model that built it."""

from pathlib import Path

import pytest

from cmcgns import load_index
from cmcgns.library.model import Model
from cmcgns.search.index import Index
from tests.library.conftest import model as model
from tests.library.conftest import run as run
from tests.search.made import make_index


@pytest.fixture(scope="session")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an index of three shards; not to be changed."""
    return make_index(tmp_path_factory.mktemp("search") / "index", model)


@pytest.fixture(scope="session")
def index(folder: Path, model: Model) -> Index:
    return load_index(folder, model)
