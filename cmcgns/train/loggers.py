"""Metrics of a run at Weights & Biases and MLflow, beside metrics.jsonl and TensorBoard (`run.loggers`).

Both get the numbers of metrics.jsonl and the settings without paths: no films, no reports, no pictures. Keys come from the
environment, as both services document it. A service that is away does not end a run.
"""

import json
import logging
import math
import netrc
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from cmcgns import storage
from cmcgns.config import Config
from cmcgns.errors import UserError
from cmcgns.library.runs import portable_settings

logger = logging.getLogger(__name__)
PROJECT = "cmcgns"
"""Project or experiment, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names another."""
IDS = "loggers.json"
"""File of a run folder with the run's id at each service, with which a resumed run goes on there."""
CLOSE_S = 60
"""Seconds that the end of a run waits for its last metrics to be sent."""
MOST_METRICS = 1000
"""Metrics that MLflow takes in one request."""
PRIVATE = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
"""Both would report on their own use."""


class MetricsLogger(Protocol):
    """A run at one service."""

    identity: str

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Send the numbers of rows of metrics.jsonl."""

    def close(self) -> None:
        """Send what is left."""


def check_loggers(config: Config) -> None:
    """Raise ``UserError`` for a service whose package or key is missing."""
    for name in config.run.loggers:
        if find_spec(name) is None:
            raise UserError(f"run.loggers {name}: its package is not installed: pip install 'cmcgns[loggers]'")
    online = os.environ.get("WANDB_MODE", "online") == "online"
    if "wandb" in config.run.loggers and online and not has_wandb_key():
        raise UserError(
            "run.loggers wandb: there is no key for Weights & Biases: set WANDB_API_KEY, or WANDB_MODE=offline and send the run "
            "later with wandb sync"
        )


def has_wandb_key() -> bool:
    """Whether WANDB_API_KEY or ~/.netrc has a key; its value is not read."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rpartition("/")[2]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def open_loggers(config: Config, folder: str, scratch: Path) -> list[MetricsLogger]:
    """The run in ``folder`` at each service of the settings. Their own files go to ``scratch``."""
    if not config.run.loggers:
        return []
    check_loggers(config)  # a worker may be on another machine than the driver
    for name, value in PRIVATE.items():
        os.environ.setdefault(name, value)
    path = storage.join(folder, IDS)
    known = json.loads(storage.read_bytes(path)) if storage.exists(path) else {}
    settings, run_name = json.loads(portable_settings(config)), folder.rpartition("/")[2]
    opened = {name: LOGGERS[name](run_name, known.get(name), settings, scratch) for name in config.run.loggers}
    ids = known | {name: each.identity for name, each in opened.items()}
    storage.write_bytes(path, (json.dumps(ids) + "\n").encode())
    return list(opened.values())


class WeightsAndBiases:
    """A run at Weights & Biases; WANDB_MODE=offline writes it to ``scratch`` for `wandb sync`."""

    def __init__(self, name: str, identity: str | None, settings: Mapping[str, Any], scratch: Path) -> None:
        import wandb

        self.identity = identity or uuid.uuid4().hex
        quiet = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_stats=True
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, id=self.identity, resume="allow",
            config=dict(settings), dir=scratch, settings=quiet,
        )  # fmt: skip
        # steps of a resumed run begin before its last one, which wandb's own count of steps does not allow
        self._run.define_metric("*", step_metric="step")

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Send the numbers of rows of metrics.jsonl."""
        for row in rows:
            self._run.log({"step": row["step"], **numbers(row)})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MLflow:
    """A run at the server of MLFLOW_TRACKING_URI; without one, in ``mlflow.db`` of ``scratch``."""

    def __init__(self, name: str, identity: str | None, settings: Mapping[str, Any], scratch: Path) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{scratch / 'mlflow.db'}")
        self._unsent: list[Any] = []
        if identity is None:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self._client.create_experiment(experiment)
            identity = self._client.create_run(number, run_name=name).info.run_id
            values = [Param(key, value[:500]) for key, value in flat(settings).items()]
            for start in range(0, len(values), 100):
                self._client.log_batch(identity, params=values[start : start + 100])
        self.identity = identity

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Send the numbers of rows of metrics.jsonl."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._unsent += [Metric(key, value, now, row["step"]) for row in rows for key, value in numbers(row).items()]
        while self._unsent:
            self._client.log_batch(self.identity, metrics=self._unsent[:MOST_METRICS])
            del self._unsent[:MOST_METRICS]

    def close(self) -> None:
        """Send what is left."""
        self.write([])
        self._client.set_terminated(self.identity)


LOGGERS: dict[str, Callable[[str, str | None, Mapping[str, Any], Path], MetricsLogger]] = {
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


class Loggers:
    """All services of a run, in a thread: a service that does not answer must not stall the loop."""

    def __init__(self, loggers: list[MetricsLogger]) -> None:
        self._loggers, self._warned = loggers, set[str]()
        self._rows = queue.SimpleQueue[list[dict[str, Any]] | None]()
        self._thread = threading.Thread(target=self._send_all, name="loggers", daemon=True)
        if loggers:
            self._thread.start()

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Send the numbers of rows of metrics.jsonl; MLflow's that cannot be sent are tried again with the next ones."""
        self._rows.put(rows)

    def close(self) -> None:
        """Send what is left; waits a minute at most."""
        if not self._loggers:
            return
        self._rows.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.warning("run.loggers: not all metrics were sent within %d s; metrics.jsonl has them", CLOSE_S)

    def _send_all(self) -> None:
        while (rows := self._rows.get()) is not None:
            for each in self._loggers:
                self._try(each, lambda each=each, rows=rows: each.write(rows))  # type: ignore[misc]
        for each in self._loggers:
            self._try(each, each.close)

    def _try(self, each: MetricsLogger, send: Callable[[], None]) -> None:
        name = type(each).__name__
        try:
            send()
        except Exception as error:  # whatever a client raises: a service that is away must not end a run
            if name not in self._warned:
                logger.warning("%s did not take metrics (%s); metrics.jsonl has them", name, type(error).__name__)
            self._warned.add(name)


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl as SPLIT/NAME, as in TensorBoard; what is not finite is left out."""
    return {
        f"{row['split']}/{key}": value
        for key, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value) and key not in ("step", "stage", "epoch")
    }


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as SECTION.NAME."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return found
