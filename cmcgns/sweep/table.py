"""What the terminal shows of a sweep: a table of its trials that moves, or a line for each change where it is a file."""

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
from cmcgns.train.run import Share

POLL_S = 1.0
COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red", "waiting": "dim"}


class SweepMonitor(Admission):
    """A small actor on the driver's node: the admission, how far each running trial is, and what its processes have said."""

    def __init__(self, count: Callable[[], Capacity]) -> None:
        super().__init__(count)
        self.groups: dict[int, list[Any]] = {}
        self.steps: dict[int, tuple[int, int]] = {}
        self.lines: list[tuple[int, int, str]] = []

    def tell(self, number: int, step: int, total: int, lines: list[tuple[int, str]]) -> None:
        """Trial ``number`` has come to ``step`` of ``total``."""
        self.steps[number] = step, total
        for level, line in lines:
            self.say(number, level, line)

    def say(self, number: int, level: int, line: str) -> None:
        """Keep a line of trial ``number`` for the driver's terminal."""
        self.lines.append((number, level, line))

    def hold(self, number: int, group: Any) -> None:
        """Remember the placement group of trial ``number``: Ray Train's own cleaner may leave that of a killed run for ever."""
        self.groups.setdefault(number, []).append(group)

    def enter(self, number: int) -> Share | None:
        """See ``Admission.enter``; says once why nobody may. What the trial's last attempt has left behind is freed."""
        self._free(number)
        before = self.refusal
        share = super().enter(number)
        if self.refusal and self.refusal != before:
            self.say(number, logging.WARNING, f"waits for nodes: {self.refusal}")
        return share

    def leave(self, number: int) -> None:
        """See ``Admission.leave``; whatever trial ``number`` has left behind is freed."""
        self._free(number)
        super().leave(number)

    def _free(self, number: int) -> None:
        for group in self.groups.pop(number, []):
            ray.util.remove_placement_group(group)

    def empty(self) -> None:
        """See ``Admission.empty``; whatever the trials have left behind is freed."""
        for number in list(self.groups):
            self._free(number)
        super().empty()

    def news(self) -> tuple[dict[int, tuple[int, int]], list[tuple[int, int, str]]]:
        """Step and total by trial, and the lines since the last call."""
        lines, self.lines = self.lines, []
        return dict(self.steps), lines


class SweepTable:
    """Follows ledger and watch until closed."""

    def __init__(self, ledger: Ledger, watch: Any, metric: str, console: Console) -> None:
        self.ledger, self.watch, self.metric, self.console = ledger, watch, metric, console
        self._steps: dict[int, tuple[int, int]] = {}
        self._shown: dict[int, tuple[Any, ...]] = {
            trial.number: self._state(trial) for trial in ledger.trials if trial.status != "waiting"
        }
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="sweep-table", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show what has not been shown yet, and stop."""
        self._done.set()
        self._thread.join(timeout=10)

    def _follow(self) -> None:
        with Live(self._table(), console=self.console, auto_refresh=False, transient=True) as live:
            over = False
            while not over:
                over = self._done.wait(POLL_S)
                self._read()
                if self.console.is_terminal:
                    live.update(self._table(), refresh=True)

    def _read(self) -> None:
        try:
            self._steps, lines = ray.get(self.watch.news.remote(), timeout=10)
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
    """What a trial drew, in a line."""
    return ", ".join(f"{key.split('.', 1)[1]} {format_value(value)}" for key, value in trial.drawn.items())


def format_value(value: Any) -> str:
    """A drawn value with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
