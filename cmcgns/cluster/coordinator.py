"""The coordinator: one small actor through which workers, data tasks, clustering actors and the driver tell each other things."""

import contextlib
import logging
import time
from typing import Any

import ray

from cmcgns.bad_rows import too_many_bad
from cmcgns.errors import UserError


class RunCoordinator:
    """Bad rows, the last metrics, log lines and the wish to stop. Lives on the driver's node, takes no CPU."""

    def __init__(self, studies: int, max_bad_fraction: float, known_bad: dict[str, str]) -> None:
        self.studies = studies
        self.max_bad_fraction = max_bad_fraction
        self.bad = dict(known_bad)
        self.row: dict[str, Any] = {}
        self.lines: list[tuple[int, str]] = []
        self.stop = False
        self.failed: str | None = None
        self.outcome: dict[str, Any] | None = None
        self.parts: dict[int, Any] = {}
        self.validations: list[dict[str, Any]] = []
        self.marks: dict[str, float] = {}
        self.group: Any = None

    def add_bad_rows(self, rows: list[dict[str, str]]) -> None:
        """Remember each unusable study once; too many of them end the run."""
        self.bad |= {row["source"]: row["reason"] for row in rows}
        complaint = too_many_bad(len(self.bad), self.studies, self.max_bad_fraction, self.bad.values())
        if complaint is not None:
            self.fail(complaint)
            raise UserError(complaint)

    def fail(self, reason: str) -> None:
        """Say why the run cannot go on; restarting would not help."""
        self.failed = self.failed or reason

    def failure(self) -> str | None:
        """What ``fail`` was told first."""
        return self.failed

    def update(self, row: dict[str, Any]) -> None:
        """Remember the latest row of metrics, and each validation until it is asked for."""
        self.row = row
        if row.get("split") == "val":
            self.validations.append(row)

    def mark(self, moment: str) -> None:
        """Remember when the run came to ``moment`` last."""
        self.marks[moment] = time.time()

    def hold(self, group: Any) -> None:
        """Remember the placement group that the workers hold."""
        self.group = group

    def log(self, level: int, line: str) -> None:
        """Keep a line for the driver's terminal."""
        self.lines.append((level, line))

    def request_stop(self) -> None:
        """Ask the ranks to save and stop after their current step."""
        self.stop = True

    def stop_requested(self) -> bool:
        """True once the driver has asked."""
        return self.stop

    def hand_out(self, parts: list[Any]) -> None:
        """Keep one thing for each rank until it takes it."""
        self.parts = dict(enumerate(parts))

    def take(self, rank: int) -> Any:
        """What was handed out for ``rank``."""
        return self.parts.pop(rank)

    def finish(self, outcome: dict[str, Any]) -> None:
        """Rank 0's account of a run that has come to its end, or was stopped."""
        self.outcome = outcome

    def news(self) -> dict[str, Any]:
        """The latest row, the moments that were marked, the workers' placement group, and the log lines and validations since
        the last call."""
        lines, validations = self.lines, self.validations
        self.lines, self.validations = [], []
        return {"row": self.row, "lines": lines, "validations": validations, "marks": self.marks, "group": self.group}

    def account(self) -> dict[str, Any]:
        """Outcome, failure, bad rows, the last row of metrics, and the moments that were marked."""
        return {
            "outcome": self.outcome,
            "failure": self.failed,
            "bad_rows": dict(self.bad),
            "row": self.row,
            "marks": self.marks,
        }


class CoordinatorHandler(logging.Handler):
    """Sends this package's log lines to the coordinator, which shows them on the driver's terminal."""

    def __init__(self, coordinator: Any) -> None:
        super().__init__(logging.INFO)
        self.coordinator = coordinator

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # logging must never end a run
            self.coordinator.log.remote(record.levelno, record.getMessage())


def log_to_coordinator(coordinator: Any) -> None:
    """Route log lines of ``cmcgns`` in this process to ``coordinator``."""
    logger = logging.getLogger("cmcgns")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [CoordinatorHandler(coordinator)]


def start_coordinator(studies: int, max_bad_fraction: float, known_bad: dict[str, str]) -> Any:
    """The coordinator's handle; ``known_bad`` are reasons by study, ``studies`` counts them too."""
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    make = ray.remote(RunCoordinator).options(num_cpus=0, label_selector=here)
    return make.remote(studies, max_bad_fraction, known_bad)
