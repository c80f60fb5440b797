"""A run folder for the tests of the library."""

from pathlib import Path

import pytest

from cmcgns import load
from cmcgns.library.model import Model
from cmcgns.library.runs import EXPORT_SETTINGS, portable_settings
from cmcgns.run_folder import EXPORT_HASHES
from cmcgns.storage.integrity import write_hashes
from tests.evaluate.test_embed_job import write_run
from tests.small import small_config

CONFIG = small_config(
    objective__local_negatives="films", model__image_encoder="resnet-tiny-16", data__image_size=48, data__resize=56
)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the export of an untrained model, as a run writes it."""
    folder = tmp_path_factory.mktemp("library") / "run"
    write_run(folder, CONFIG)
    (folder / "export" / EXPORT_SETTINGS).write_text(portable_settings(CONFIG))
    (folder / "export" / EXPORT_HASHES).unlink()
    write_hashes(folder / "export", EXPORT_HASHES)
    return folder


@pytest.fixture(scope="session")
def model(run: Path) -> Model:
    return load(str(run))
