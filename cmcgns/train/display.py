"""Progress line on the driver's terminal, and log lines of workers and actors."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cmcgns.cluster.coordinator import WORKER_STARTED
from cmcgns.cluster.placement import describe_request
from cmcgns.train.schedule import Schedule
from cmcgns.user_folders import ray_temp_folder

POLL_S = 0.5
SILENCE_S = 60.0
"""After this long without a step, and then each time after twice as long, say what the run waits for."""


def describe(row: dict[str, Any]) -> str:
    """One line for a row of metrics."""
    if not row:
        return "starting workers"
    if row["split"] == "val":
        if "i2t_recall_at_1" not in row:  # films alone
            return f"stage {row['stage']} validation: loss {row['loss']:.3f} on {row['studies']} studies"
        both = f"i2t {row['i2t_recall_at_1']:.1%} t2i {row['t2i_recall_at_1']:.1%}"
        return f"stage {row['stage']} validation: recall@1 {both} (chance {row['chance_recall_at_1']:.2%})"
    losses = " ".join(
        f"{key.removeprefix('loss_')} {value:.3f}" for key, value in row.items() if key.split("_")[0] == "loss"
    )
    waits = f"data {row['data_wait_s'] / row['step_s']:.0%} pool {row['pool_wait_s'] / row['step_s']:.0%}"
    speed = f"{row['studies_per_s']:.0f} studies/s, waiting {waits}"
    centroids = f" | centroids v{row['centroids_version']}" if "centroids_version" in row else ""
    return f"stage {row['stage']}: {losses}{centroids} | {speed}"


class Display:
    """Polls the coordinator until closed: a progress bar on a terminal, plain lines otherwise."""

    def __init__(
        self, coordinator: Any, schedule: Schedule, needed: Sequence[dict[str, float]], console: Console
    ) -> None:
        """``needed``: resource bundles of the run."""
        self.coordinator, self.schedule, self.needed, self.console = coordinator, schedule, needed, console
        self._began, self._silence_s = time.monotonic(), SILENCE_S
        self._done = threading.Event()
        self._shown: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._follow, name="display", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show the last news and stop."""
        self._done.set()
        self._thread.join(timeout=10)

    def _follow(self) -> None:
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(20),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("starting workers", total=self.schedule.total)
            while not self._done.wait(POLL_S):
                self._show(bar, task)
            self._show(bar, task)

    def _show(self, bar: Progress, task: Any) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            news = ray.get(self.coordinator.news.remote())
            for level, line in news["lines"]:
                style = "yellow" if level >= logging.WARNING else ""
                self.console.print(line, style=style, highlight=False, markup=False)
            row = news["row"]
            if not row:
                self._explain_silence(news["marks"])
            if row == self._shown:
                return
            self._shown = row
            bar.update(task, completed=row.get("step", 0), description=describe(row))
            others = [] if self.console.is_terminal or row in news["validations"] else [row]
            for each in (*news["validations"], *others):
                self.console.print(
                    f"step {each.get('step', 0)}/{self.schedule.total} {describe(each)}", highlight=False
                )

    def _explain_silence(self, events: dict[str, float]) -> None:
        waited = time.monotonic() - self._began
        if waited < self._silence_s:
            return
        self._silence_s *= 2
        self.console.print(
            f"no step after {waited:.0f} s: {waits_for(events, self.needed)}", style="yellow", highlight=False
        )


def waits_for(events: dict[str, float], needed: Sequence[dict[str, float]]) -> str:
    """What a run without a step waits for, by what its workers have reached, and where to look."""
    if "training" in events:
        return (
            "workers wait for their first films. Either this machine is busy and decodes slowly (`uptime`), or the storage is "
            "slow or does not answer (`python -m cmcgns.doctor`)"
        )
    if WORKER_STARTED in events:
        return (
            "workers import their libraries, or compile DeepSpeed's op (minutes, once per machine: `python -m "
            "cmcgns.train.build_ops`)"
        )
    return (
        f"Ray has not started the workers; {describe_request(needed)}. See `ray status`, and Ray's logs in "
        f"{ray_temp_folder()}/ray/session_latest/logs"
    )


@contextlib.contextmanager
def stop_on_interrupt(coordinator: Any) -> Iterator[None]:
    """The first SIGINT requests a checkpoint and a clean stop; the second raises KeyboardInterrupt."""

    def request_stop(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        coordinator.log.remote(logging.WARNING, "stopping after this step; press Ctrl-C again to stop at once")
        coordinator.request_stop.remote()

    before = signal.signal(signal.SIGINT, request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
