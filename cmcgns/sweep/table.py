"""Terminal output of a sweep: a live table of the trials, or one line per change if the output is a file."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import ray
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from cmcgns.sweep.admission import Admission, Capacity
from cmcgns.sweep.ledger import Ledger, Trial
from cmcgns.train.run import CpuShare

POLL_S = 1.0
COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red", "waiting": "dim"}


class SweepMonitor(Admission):
    """Actor on the driver's node: the admission, the step of each running trial, and log lines of the trials."""

    def __init__(self, get_capacity: Callable[[], Capacity]) -> None:
        super().__init__(get_capacity)
        self.groups: dict[int, list[Any]] = {}
        self.steps: dict[int, tuple[int, int]] = {}
        self.lines: list[tuple[int, int, str]] = []

    def report_step(self, number: int, step: int, total: int, lines: list[tuple[int, str]]) -> None:
        """Record the step of trial ``number``, and its log lines."""
        self.steps[number] = step, total
        for level, line in lines:
            self.log(number, level, line)

    def log(self, number: int, level: int, line: str) -> None:
        """Record a line of trial ``number`` for the driver's terminal."""
        self.lines.append((number, level, line))

    def add_group(self, number: int, group: Any) -> None:
        """Record a placement group of trial ``number``: Ray Train's cleaner may never remove that of a killed run."""
        self.groups.setdefault(number, []).append(group)

    def enter(self, number: int) -> CpuShare | None:
        """See ``Admission.enter``. Removes what the trial's last attempt left, and logs once why no trial is admitted."""
        self._free(number)
        before = self.refusal
        share = super().enter(number)
        if self.refusal and self.refusal != before:
            self.log(number, logging.WARNING, f"waits for nodes: {self.refusal}")
        return share

    def leave(self, number: int) -> None:
        """See ``Admission.leave``. Removes the trial's placement groups."""
        self._free(number)
        super().leave(number)

    def _free(self, number: int) -> None:
        for group in self.groups.pop(number, []):
            ray.util.remove_placement_group(group)

    def clear(self) -> None:
        """See ``Admission.clear``. Removes the placement groups of all trials."""
        for number in list(self.groups):
            self._free(number)
        super().clear()

    def news(self) -> tuple[dict[int, tuple[int, int]], list[tuple[int, int, str]]]:
        """Step and total by trial, and the lines since the last call."""
        lines, self.lines = self.lines, []
        return dict(self.steps), lines


class SweepTable:
    """Prints changes of the ledger and the monitor until closed."""

    def __init__(self, ledger: Ledger, monitor: Any, metric: str, console: Console) -> None:
        self.ledger, self.monitor, self.metric, self.console = ledger, monitor, metric, console
        self._steps: dict[int, tuple[int, int]] = {}
        self._shown: dict[int, tuple[Any, ...]] = {
            trial.number: self._state(trial) for trial in ledger.trials if trial.status != "waiting"
        }
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="sweep-table", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Print the last changes, and stop."""
        self._done.set()
        self._thread.join(timeout=10)

    def _follow(self) -> None:
        with Live(self._table(), console=self.console, auto_refresh=False, transient=True) as live:
            done = False
            while not done:
                done = self._done.wait(POLL_S)
                self._read()
                if self.console.is_terminal:
                    live.update(self._table(), refresh=True)

    def _read(self) -> None:
        try:
            self._steps, lines = ray.get(self.monitor.news.remote(), timeout=10)
        except ray.exceptions.RayError:
            return
        for number, level, line in lines:
            if level >= logging.WARNING:
                self.console.print(f"trial {number}: {line}", style="yellow", highlight=False, markup=False)
        for trial in list(self.ledger.trials):
            state = self._state(trial)
            if trial.status != "waiting" and self._shown.get(trial.number) != state:
                self._shown[trial.number] = state
                if not self.console.is_terminal:
                    self.console.print(self._line(trial), highlight=False, markup=False)

    @staticmethod
    def _state(trial: Trial) -> tuple[Any, ...]:
        return trial.status, len(trial.values)

    def _line(self, trial: Trial) -> str:
        repeats = "" if trial.repeats is None else f" (trial {trial.repeats} with seed {trial.seed})"
        what = f"trial {trial.number}{repeats} {trial.status} at step {trial.step}"
        if trial.values:
            what += f", {self.metric} {trial.value:.4f}"
        return what + (f": {trial.reason}" if trial.reason else "" if trial.values else f": {settings_line(trial)}")

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("trial", "status", "step", self.metric, "settings"):
            table.add_column(name)
        for trial in list(self.ledger.trials):
            step, total = self._steps.get(trial.number, (trial.step, 0))
            step = max(step, trial.step)
            name = str(trial.number) if trial.repeats is None else f"{trial.number} = {trial.repeats}"
            value = "" if trial.value is None else f"{trial.value:.4f}"
            table.add_row(
                name,
                f"[{COLOURS[trial.status]}]{trial.status}[/]",
                f"{step}/{total}" if total else str(step),
                value,
                escape(trial.reason or settings_line(trial)),
            )
        return table


def settings_line(trial: Trial) -> str:
    """Drawn settings of a trial in one line, with three significant digits."""
    return ", ".join(
        f"{key.split('.', 1)[1]} {f'{value:.3g}' if isinstance(value, float) else value}"
        for key, value in trial.drawn.items()
    )
