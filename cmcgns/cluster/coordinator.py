"""Coordinator of a run: one small actor that passes messages between workers, data tasks, clustering actors and the driver."""

import contextlib
import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray

from cmcgns.bad_rows import too_many_bad
from cmcgns.cluster.heartbeat import Beat, Beats
from cmcgns.cluster.placement import this_node
from cmcgns.errors import UserError

WORKER_STARTED = "worker"
"""Event: a worker's process runs; it still has to import its libraries."""


class BadRows:
    """The reason of each unusable study by its source, and how many of ``studies`` may be unusable."""

    def __init__(self, studies: int, max_fraction: float, known: dict[str, str]) -> None:
        self.studies, self.max_fraction = studies, max_fraction
        self.reasons = dict(known)

    def add(self, rows: Iterable[dict[str, str]]) -> str | None:
        """Record each study once. Returns an error message if there are too many."""
        self.reasons |= {row["source"]: row["reason"] for row in rows}
        return too_many_bad(len(self.reasons), self.studies, self.max_fraction, self.reasons.values())


class MetricRows:
    """The latest row of metrics, and the validations that the driver has not fetched."""

    def __init__(self) -> None:
        self.latest: dict[str, Any] = {}
        self._validations: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Record a row."""
        self.latest = row
        if row.get("split") == "val":
            self._validations.append(row)

    def fetch_validations(self) -> list[dict[str, Any]]:
        """Validations since the last call."""
        validations, self._validations = self._validations, []
        return validations


class LogLines:
    """Level and text of the log lines that the driver has not fetched."""

    def __init__(self) -> None:
        self._lines: list[tuple[int, str]] = []

    def add(self, level: int, line: str) -> None:
        """Record a line."""
        self._lines.append((level, line))

    def fetch(self) -> list[tuple[int, str]]:
        """Lines since the last call."""
        lines, self._lines = self._lines, []
        return lines


class RunEnd:
    """Why and how the run ends: a stop request, the first failure, rank 0's outcome."""

    def __init__(self) -> None:
        self.stop_requested = False
        self.resize_requested = False
        self.failure: str | None = None
        self.hang: str | None = None
        self.error: str | None = None
        self.outcome: dict[str, Any] | None = None

    def fail(self, reason: str) -> None:
        """Record a failure that a retry would not fix; the first one counts."""
        self.failure = self.failure or reason


class WorkerGroup:
    """One object for each rank, the placement group of the workers, and the time at which they last reached each event."""

    def __init__(self) -> None:
        self.parts: dict[int, Any] = {}
        self.placement_group: Any = None
        self.event_times: dict[str, float] = {}


class RunCoordinator:
    """The actor: every method is one message. Runs on the driver's node and reserves no CPU."""

    def __init__(self, studies: int, max_bad_fraction: float, known_bad: dict[str, str]) -> None:
        spare_from_oom()
        self.bad_rows = BadRows(studies, max_bad_fraction, known_bad)
        self.metrics, self.lines, self.end, self.workers = MetricRows(), LogLines(), RunEnd(), WorkerGroup()
        self.ranks = Beats()

    def add_bad_rows(self, rows: list[dict[str, str]]) -> None:
        """Record unusable studies; too many of them end the run."""
        error = self.bad_rows.add(rows)
        if error is not None:
            self.end.fail(error)
            raise UserError(error)

    def fail(self, reason: str) -> None:
        """Record a failure that a retry would not fix."""
        self.end.fail(reason)

    def failure(self) -> str | None:
        """The first failure."""
        return self.end.failure

    def update(self, row: dict[str, Any]) -> None:
        """Record a row of metrics."""
        self.metrics.add(row)

    def log(self, level: int, line: str) -> None:
        """Record a line for the driver's terminal."""
        self.lines.add(level, line)

    def request_stop(self) -> None:
        """Ask the ranks to save and stop after their current step."""
        self.end.stop_requested = True

    def request_resize(self) -> None:
        """Ask the ranks to save and stop after their current step, since another number of them will go on."""
        self.end.resize_requested = True

    def stop_requested(self) -> bool:
        """Whether the ranks are to stop."""
        return self.end.stop_requested or self.end.resize_requested

    def start_again(self, lost: bool) -> bool:
        """True if other ranks are to go on, in place of ``lost`` ones or of those that stopped for a resize."""
        end, finished = self.end, bool(self.end.outcome and self.end.outcome["finished"])
        if finished or end.stop_requested or end.failure is not None or not (lost or end.resize_requested):
            return False
        end.resize_requested, end.outcome = False, None
        return True

    def hand_out(self, parts: list[Any]) -> None:
        """Store one object for each rank, by rank."""
        self.workers.parts = dict(enumerate(parts))

    def take(self, rank: int) -> Any:
        """Remove and return the object of ``rank``."""
        return self.workers.parts.pop(rank)

    def hold(self, group: Any) -> None:
        """Record the placement group of the workers."""
        self.workers.placement_group = group

    def mark(self, moment: str) -> None:
        """Record the current time as that of ``moment``."""
        self.workers.event_times[moment] = time.time()
        if moment == WORKER_STARTED:  # in place of the ranks before
            self.ranks.last.clear()
            self.end.hang = None

    def reached(self, moment: str) -> float:
        """The time of ``moment``; 0 if it has not come."""
        return self.workers.event_times.get(moment, 0.0)

    def enlist(self, rank: int, actor: Any) -> None:
        """Record the actor of ``rank``."""
        self.ranks.actors[rank] = actor

    def beat(self, rank: int, beat: Beat) -> None:
        """Record what ``rank`` does."""
        self.ranks.add(rank, beat)

    def leave(self, rank: int) -> None:
        """Record that ``rank`` has ended: it is silent from now on."""
        self.ranks.last.pop(rank, None)

    def beats(self) -> tuple[dict[int, Beat], dict[int, Any], float]:
        """Last beat and actor of each rank, and the time."""
        return self.ranks.last, self.ranks.actors, time.time()

    def hangs(self, message: str) -> None:
        """Record that ranks hang and are killed; until others are started it is the reason if the run fails."""
        self.end.hang = message
        self.ranks.last.clear()

    def report_error(self, rank: int, error: str) -> None:
        """Record why ``rank`` failed. The first one counts: the other ranks fail because they miss it."""
        self.end.error = self.end.error or f"rank {rank} failed: {error}"

    def take_error(self) -> str | None:
        """Why the ranks before failed, once."""
        error, self.end.error = self.end.error, None
        return error

    def finish(self, outcome: dict[str, Any]) -> None:
        """Record rank 0's outcome of a run that finished or was stopped."""
        self.end.outcome = outcome

    def news(self) -> dict[str, Any]:
        """Latest metrics, event times and placement group, and the log lines and validations since the last call."""
        return {
            "row": self.metrics.latest,
            "lines": self.lines.fetch(),
            "validations": self.metrics.fetch_validations(),
            "marks": self.workers.event_times,
            "group": self.workers.placement_group,
        }

    def account(self) -> dict[str, Any]:
        """Outcome, failure, hang, bad rows, latest metrics and event times."""
        return {
            "outcome": self.end.outcome,
            "failure": self.end.failure,
            "hang": self.end.hang,
            "bad_rows": dict(self.bad_rows.reasons),
            "row": self.metrics.latest,
            "marks": self.workers.event_times,
        }


def spare_from_oom() -> None:
    """Let the kernel kill other processes of Ray first: it marks all its workers as the first to go. Ray's own monitor spares the
    actors that were created first, as the coordinator is."""
    with contextlib.suppress(OSError):  # not on macOS
        Path("/proc/self/oom_score_adj").write_text("0")


STATE_TIMEOUT_S = 20
USED_MEMORY = re.compile(r"was ([\d.]+)GB used / ([\d.]+)GB limit")
LOST = (
    "the {} of the run was killed, most likely because the machine had no memory left (`dmesg` tells). Lower "
    "train.num_workers, data.studies_ahead or train.microbatch_size, or take a machine with more memory"
)


def memory_failure() -> str | None:
    """Where Ray has killed processes of this job because memory ran short, and what to lower; None if it has killed none.

    Ray reports it differently each time: as a lost actor, a failed task or a node's policy.
    """
    from ray.util.state import list_workers  # imported here: the coordinator's process does without

    from cmcgns.cluster.cluster_checks import dashboard_url

    with contextlib.suppress(Exception):  # no dashboard, or it does not answer: the failure is told by Ray's own words
        killed = list_workers(
            f"http://{dashboard_url()}",
            [("exit_type", "=", "NODE_OUT_OF_MEMORY")],
            detail=True,
            timeout=STATE_TIMEOUT_S,
        )
        job = f"job ID={ray.get_runtime_context().get_job_id()}"
        mine = [worker for worker in killed if job in (worker.exit_detail or "")]
        if mine:
            used = USED_MEMORY.search(mine[-1].exit_detail)
            amount = f": {used[1]} of {used[2]} GB were in use" if used else ""
            return (
                f"memory ran out on node {mine[-1].ip}{amount}, and Ray killed {len(mine)} processes of this run. Lower "
                "train.microbatch_size, data.studies_ahead, clustering.bank_size or train.num_workers, or use machines with more "
                "memory"
            )
    return None


def read_account(coordinator: Any, known_bad: dict[str, str]) -> dict[str, Any]:
    """The coordinator's account; if it was killed, one that says so, with the bad rows that are known."""
    try:
        account: dict[str, Any] = ray.get(coordinator.account.remote())
        return account
    except ray.exceptions.RayActorError:
        lost = {"failure": LOST.format("coordinator"), "hang": None, "bad_rows": known_bad}
        return {"outcome": None, "row": {}, "marks": {}} | lost


def has_failed(coordinator: Any) -> bool:
    """True after a failure that a restart does not fix, the loss of the coordinator among them."""
    try:
        return ray.get(coordinator.failure.remote()) is not None
    except ray.exceptions.ActorDiedError:
        return True


class CoordinatorHandler(logging.Handler):
    """Sends log lines to the coordinator, for the driver's terminal."""

    def __init__(self, coordinator: Any) -> None:
        super().__init__(logging.INFO)
        self.coordinator = coordinator

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # logging must never end a run
            self.coordinator.log.remote(record.levelno, record.getMessage())


def log_to_coordinator(coordinator: Any) -> None:
    """Send the log lines of ``cmcgns`` in this process to ``coordinator`` only."""
    logger = logging.getLogger("cmcgns")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [CoordinatorHandler(coordinator)]


def start_coordinator(studies: int, max_bad_fraction: float, known_bad: dict[str, str]) -> Any:
    """Handle of a new coordinator. ``known_bad`` has reasons by source; ``studies`` includes those."""
    make = ray.remote(RunCoordinator).options(num_cpus=0, label_selector=this_node())
    return make.remote(studies, max_bad_fraction, known_bad)
