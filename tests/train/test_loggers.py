"""Weights & Biases and MLflow, offline: the numbers of metrics.jsonl, and nothing private."""

import json
import struct
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from wandb.proto import wandb_internal_pb2

from cmcgns.config import Config
from cmcgns.errors import UserError
from cmcgns.train.loggers import Loggers, check_loggers
from cmcgns.train.metrics import RunLog
from tests.small import small_config

KEY = "0123456789abcdef0123456789abcdef01234567"
BLOCK = 32_768
Sent = dict[str, dict[int, float]]
"""Values by name and step."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path))


def config_of(*loggers: str) -> Config:
    return small_config(run__loggers=loggers, data__uri="/data/hospital of someone")


def rows(*steps: int) -> list[dict[str, Any]]:
    of_steps = [
        {
            "step": step,
            "stage": 1,
            "split": "train",
            "epoch": 0,
            "loss": 1 / step,
            "studies_digest": "ab",
            "gradient_norm": None,
        }
        for step in steps
    ]
    return [*of_steps, {"step": steps[-1], "stage": 1, "split": "val", "loss": 2 / steps[-1], "studies": 8}]


def in_jsonl(folder: Path) -> Sent:
    """The numbers of metrics.jsonl, apart from where a row belongs."""
    found: Sent = defaultdict(dict)
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        for key, value in row.items():
            if key not in ("step", "stage", "epoch", "split") and isinstance(value, int | float):
                found[f"{row['split']}/{key}"][row["step"]] = value
    return found


def in_wandb(file: Path) -> tuple[Sent, str]:
    """The history in a file of W&B, which is a log of LevelDB with records of protobuf, and the run's id."""
    data, place, whole, found, identity = file.read_bytes(), 7, b"", defaultdict[str, dict[int, float]](dict), ""
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            identity = record.run.run_id or identity
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            for key, value in items.items():
                if not key.startswith("_") and key != "step":
                    found[key][int(items["step"])] = value
    return found, identity


def test_both_services_get_the_numbers_of_metrics_jsonl_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    log = RunLog(str(run), run, 0, config_of("wandb", "mlflow"))
    log.write(rows(1, 2, 3, 4))
    log.close()
    first = json.loads((run / "loggers.json").read_text())
    log = RunLog(str(run), run, 2, config_of("wandb", "mlflow"))  # from a checkpoint after step 2
    log.write(rows(3, 4, 5))
    log.close()
    assert json.loads((run / "loggers.json").read_text()) == first
    expected = in_jsonl(run)
    assert set(expected) == {"train/loss", "val/loss", "val/studies"}
    assert sorted(expected["train/loss"]) == [1, 2, 3, 4, 5]

    together: Sent = defaultdict(dict)
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime):
        found, identity = in_wandb(file)
        assert identity == first["wandb"]
        for name, values in found.items():
            together[name] |= values
    together["val/loss"].pop(4), together["val/studies"].pop(4)  # of the part that was repeated
    assert together == expected

    client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    [only] = client.search_runs([client.get_experiment_by_name("cmcgns").experiment_id])
    assert only.info.run_id == first["mlflow"]
    for name, values in expected.items():
        history = {each.step: each.value for each in client.get_metric_history(only.info.run_id, name)}
        assert values.items() <= history.items()
    assert only.data.params["train.learning_rate"] == "0.0001"

    for file in run.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert KEY.encode() not in content, file
            assert b"hospital of someone" not in content, file


def test_without_loggers_nothing_is_written(tmp_path: Path) -> None:
    log = RunLog(str(tmp_path), tmp_path, 0, config_of())
    log.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


class Away:
    """A service that takes nothing the first time."""

    identity = ""

    def __init__(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self.calls = 0

    def write(self, rows: list[dict[str, Any]]) -> None:
        self.calls += 1
        if self.calls == 1:
            raise ConnectionError("refused")
        self.taken += rows

    def close(self) -> None:
        raise ConnectionError("refused")


def test_a_service_that_is_away_does_not_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    away, other = Away(), Away()
    other.calls = 1
    loggers = Loggers([away, other])
    loggers.write(rows(1))
    loggers.write(rows(2))
    loggers.close()
    assert away.taken == rows(2)
    assert other.taken == rows(1) + rows(2)
    assert caplog.text.count("did not take metrics (ConnectionError)") == 1


def test_a_service_that_does_not_answer_neither_stalls_the_loop_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answered = threading.Event()

    class Silent(Away):
        def write(self, rows: list[dict[str, Any]]) -> None:
            answered.wait(60)

    monkeypatch.setattr("cmcgns.train.loggers.CLOSE_S", 0.2)
    loggers = Loggers([Silent()])
    loggers.write(rows(1))
    loggers.close()
    assert not answered.is_set()
    answered.set()
    assert "not all metrics were sent within" in caplog.text


def test_a_missing_package_or_key_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    check_loggers(config_of("wandb"))
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(
        UserError, match="there is no key for Weights & Biases: set WANDB_API_KEY, or WANDB_MODE=offline"
    ):
        check_loggers(config_of("wandb"))
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    check_loggers(config_of("wandb"))
    monkeypatch.setattr("cmcgns.train.loggers.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"run\.loggers mlflow: its package is not installed: pip install 'cmcgns\[loggers\]'"
    ):
        check_loggers(config_of("mlflow"))
