"""Every settings file that we ship loads, and printing it gives the same settings again."""

from pathlib import Path

import pytest
import yaml

from cmcgns.cli import load_config, to_yaml, validate
from cmcgns.config import Config
from tests.jobs import REPOSITORY

FILES = sorted((REPOSITORY / "jobs" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_survives_being_printed(path: Path) -> None:
    config = load_config(["--config", str(path)], Config, path)
    assert validate(yaml.safe_load(to_yaml(config)), Config) == config


def test_a_config_that_we_ship_is_found_by_its_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = REPOSITORY / "jobs" / "configs" / "phantom-tiny.yaml"
    assert load_config(["--config", "phantom-tiny"], Config, None) == load_config(["--config", str(path)], Config, None)


def test_the_published_settings_are_those_of_the_paper() -> None:
    path = REPOSITORY / "jobs" / "configs" / "published.yaml"
    config = load_config(["--config", str(path)], Config, path)
    assert config.train.microbatch_size * config.train.num_workers == config.train.global_batch_size == 128
    assert (config.objective.num_clusters, config.objective.sentence_temperature) == (128, 1.0)
    assert (config.train.precision, config.train.optimizer, config.train.learning_rate) == ("fp16", "adam", 1e-5)
    assert (config.train.stage1_epochs, config.train.stage2_epochs, config.train.warmup_epochs) == (10, 20, 1)
