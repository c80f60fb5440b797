"""`cmcgns export`: the export of a run elsewhere, whole and loadable alone, with a model card that is true of the run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

import cmcgns
from cmcgns.commands import main
from cmcgns.data.prepare.check_export import check_files, find_identifiers
from cmcgns.errors import UserError
from cmcgns.library.export import CARD, export_run
from cmcgns.library.model import Model
from cmcgns.library.runs import EXPORT_SETTINGS
from cmcgns.run_folder import EXPORT_HASHES
from cmcgns.storage.integrity import write_hashes

FILMS = [np.random.default_rng(i).integers(0, 255, (60, 50), np.uint8) for i in range(3)]


@pytest.fixture
def finished(run: Path, tmp_path: Path) -> Path:
    """A run of an earlier version, whose export has no settings, with its result."""
    folder = Path(shutil.copytree(run, tmp_path / "finished"))
    (folder / "export" / EXPORT_SETTINGS).unlink()
    (folder / "export" / EXPORT_HASHES).unlink()
    write_hashes(folder / "export", EXPORT_HASHES)
    result = {
        "status": "finished",
        "steps": 60,
        "studies_seen": 192000,
        "metrics": {"loss": 2.0, "i2t_recall_at_1": 0.125},
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_the_export_of_a_run_of_an_earlier_version_loads_alone(finished: Path, model: Model, tmp_path: Path) -> None:
    out = export_run(str(finished), str(tmp_path / "out"))
    shutil.rmtree(finished)
    assert np.array_equal(cmcgns.load(out).embed_films(FILMS), model.embed_films(FILMS))
    assert check_files(out) == []
    assert [found.what for found in find_identifiers(out) if CARD in found.ids or EXPORT_SETTINGS in found.ids] == []


def test_the_model_card_holds_data_settings_and_metrics_of_the_run(finished: Path, tmp_path: Path) -> None:
    card = (Path(export_run(str(finished), str(tmp_path / "out"))) / CARD).read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "cmcgns"
    for words in (
        "Trained on 100 generated studies (the phantom corpus, seed 0)", "It saw 192,000 studies in 60 steps.",
        "| i2t_recall_at_1 | 0.125 |", "embeddings of dimension 32", "padded to 56 x 56 pixels", "the middle 48 x 48",
        "| `model.image_encoder` | resnet-tiny-16 |", "| `objective.num_clusters` | 6 |", "| `train.stage1_steps` | 10 |",
        "gives no diagnosis",
    ):  # fmt: skip
        assert words in text
    assert "| loss |" not in text
    assert str(finished) not in card


def test_scores_of_an_evaluation_come_with_their_intervals(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    folder.mkdir()
    score = {"task": "zeroshot", "images": "phantom", "setting": "no labels", "encoder": "pretrained", "number": 1234}
    scores = [
        score | {"metric": "mean AUC", "value": 0.71239, "low": 0.65, "high": 0.77},
        score | {"metric": "AUC: edema", "value": 0.9, "low": 0.8, "high": 0.95},
        score | {"metric": "mean AUC", "value": 0.5, "low": None, "high": None, "encoder": "random"},
    ]
    facts = {"encoders": {"pretrained": f"{finished}/export", "random": "untrained"}, "scores": scores}
    (folder / "evaluation.json").write_text(json.dumps(facts))
    assert main(["export", str(finished), str(tmp_path / "out"), f"--evaluation={folder}"]) == 0
    card = (tmp_path / "out" / CARD).read_text()
    assert "| zeroshot | phantom | no labels | mean AUC | 0.712 | 0.650 to 0.770 | 1,234 |" in card
    assert "edema" not in card
    assert "0.500" not in card
    (folder / "evaluation.json").write_text(json.dumps(facts | {"encoders": {"pretrained": "/other/export"}}))
    with pytest.raises(UserError, match=r"is not of the run .*; evaluate it with --evaluate.run="):
        export_run(str(finished), str(tmp_path / "again"), str(folder))


def test_what_cannot_be_exported_has_one_message(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for words, message in (
        ([str(finished)], "required: out"),
        ([str(finished), str(tmp_path / "full")], "has files already; give a new folder"),
        ([str(tmp_path / "full"), str(tmp_path / "out")], "is not a run folder: it has no config.yaml"),
        ([str(finished), str(tmp_path / "out"), f"--evaluation={tmp_path}"], "contains no evaluation"),
    ):
        assert main(["export", *words]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()
