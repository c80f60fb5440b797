"""Files of a sweep: a table with every setting, a best.yaml that a run accepts, pictures, HParams."""

import io
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cmcgns.cli import load_config
from cmcgns.config import Config
from cmcgns.measures import MEAN_RECALL
from cmcgns.run_folder import RunFolder
from cmcgns.sweep.config import SweepConfig
from cmcgns.sweep.ledger import Ledger
from cmcgns.sweep.report import SweepResult, write_result, write_table
from cmcgns.sweep.setup import prepare_search
from tests.sweep.test_search import BASE, SPACE


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ledger]:
    """A stored sweep of six trials, the best one also with another seed."""
    folder = RunFolder(str(tmp_path_factory.mktemp("sweeps")), "sweep", resumed=False)
    ledger = Ledger(folder)
    prepare_search(ledger, SweepConfig(trials=6, search="random"), SPACE, seed=0)
    for trial, value in zip(ledger.trials, (0.1, 0.5, 0.3, 0.2, 0.4, 0.05), strict=True):
        trial.status, trial.step, trial.values = "finished", 60, {15: value / 2, 60: value}
    ledger.trials[3].status = "stopped"
    ledger.trials[5].status, ledger.trials[5].values, ledger.trials[5].reason = "failed", {}, "out of <memory>"
    again = ledger.add(ledger.trials[1].drawn, 1, repeats=1)
    again.status, again.step, again.values = "finished", 60, {60: 0.46}
    write_table(ledger, BASE, MEAN_RECALL, folder)
    write_result(folder, BASE, MEAN_RECALL, SPACE, ledger, SweepResult(ledger.finalist_scores(1), [0.44]))
    return Path(folder.uri), ledger


def test_the_table_has_every_trial_best_first_with_every_setting(swept: tuple[Path, Ledger]) -> None:
    table = pd.read_csv(swept[0] / "trials.csv")
    assert table["trial"].tolist() == [1, 6, 4, 2, 3, 0, 5]
    assert table["status"].tolist()[-1] == "failed"
    assert table[f"{MEAN_RECALL}@15"].tolist()[0] == 0.25
    drawn = swept[1].trials[4].drawn
    assert {key: table[key][2] for key in drawn} == pytest.approx(drawn)
    settings = BASE.model_dump(exclude={"run"})
    assert {f"{section}.{key}" for section, keys in settings.items() for key in keys} <= set(table.columns)


def test_best_yaml_is_the_winners_settings(swept: tuple[Path, Ledger]) -> None:
    best = load_config(["--config", str(swept[0] / "best.yaml")], Config, None)
    drawn = swept[1].trials[1].drawn
    assert best.objective.temperature == drawn["objective.temperature"]
    assert best.objective.mask_ratio == drawn["objective.mask_ratio"]
    assert not best.objective.learn_temperature
    assert (best.train.seed, best.data, best.run.name) == (0, BASE.data, None)


def test_the_pictures_and_the_page_are_complete(swept: tuple[Path, Ledger]) -> None:
    picture = Image.open(io.BytesIO((swept[0] / "sweep.png").read_bytes()))
    assert min(picture.size) > 400
    page = (swept[0] / "report.html").read_text()
    assert "out of &lt;memory&gt;" in page
    assert "best: trial 1" in page
    assert "data:image/png;base64" in page


def test_tensorboard_has_settings_and_curves(swept: tuple[Path, Ledger]) -> None:
    events = EventAccumulator(str(swept[0] / "tensorboard" / "0001"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars(MEAN_RECALL)] == [(15, 0.25), (60, 0.5)]
    assert "_hparams_/session_start_info" in events.summary_metadata
