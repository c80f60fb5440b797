"""The ledger: it can be read again, resumed sweeps continue where they stopped, and the best mean wins."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from cmcgns.measures import MEAN_RECALL
from cmcgns.run_folder import RunFolder
from cmcgns.sweep.admission import build_scheduler
from cmcgns.sweep.config import SweepConfig
from cmcgns.sweep.ledger import Ledger
from cmcgns.sweep.run import add_repeats
from cmcgns.sweep.search import LOST_TOO_OFTEN, LedgerSearch, read_space
from cmcgns.sweep.setup import prepare_search
from tests.sweep.test_search import BASE, CHOICES, SPACE


def ledger_in(folder: Path, resumed: bool = False) -> Ledger:
    return Ledger(RunFolder(str(folder), "sweep", resumed))


def nobody(number: int) -> None:
    """Ignores trials whose processes were lost too often."""


def run(proposals: LedgerSearch, name: str, values: dict[int, float], **end: Any) -> dict[str, Any]:
    """Run one trial as Tune does: suggest it, report each value, complete it."""
    spec = proposals.suggest(name)
    assert isinstance(spec, dict)
    for step, value in values.items():
        proposals.on_trial_result(name, {"step": step, MEAN_RECALL: value})
    proposals.on_trial_complete(name, {"step": max(values, default=0)} | end)
    return spec


def test_a_resumed_ledger_keeps_what_is_done_and_runs_the_rest_once(tmp_path: Path) -> None:
    settings = SweepConfig(trials=5, search="random")
    ledger = ledger_in(tmp_path)
    assert prepare_search(ledger, settings, SPACE, seed=0) is None
    proposals = LedgerSearch(ledger, ledger.unfinished, None, 5, MEAN_RECALL, 0, nobody)
    run(proposals, "a", {15: 0.1, 60: 0.3}, ended=True, **{"costs/pool": 1.5})
    run(proposals, "b", {15: 0.05})
    run(proposals, "c", {}, ended=True, failure="objective.num_clusters 4096 needs more sentences")
    proposals.suggest("d")  # now the driver is killed

    again = ledger_in(tmp_path, resumed=True)
    prepare_search(again, settings, SPACE, seed=0)
    assert [trial.status for trial in again.trials] == ["finished", "stopped", "failed", "running", "waiting"]
    assert again.trials[0].values == {15: 0.1, 60: 0.3}
    assert again.trials[0].costs == {"pool": 1.5}
    assert again.trials[2].reason == "objective.num_clusters 4096 needs more sentences"
    assert [trial.drawn for trial in again.trials] == [trial.drawn for trial in ledger.trials]
    proposals = LedgerSearch(again, again.unfinished, None, 5, MEAN_RECALL, 0, nobody)
    numbers = [run(proposals, name, {60: 0.2}, ended=True)["number"] for name in "ef"]
    assert numbers == [3, 4]
    assert proposals.suggest("g") == Searcher.FINISHED


def test_added_trials_of_a_resumed_sweep_are_drawn_after_the_existing_ones(tmp_path: Path) -> None:
    ledger, more = ledger_in(tmp_path / "few"), ledger_in(tmp_path / "many")
    prepare_search(ledger, SweepConfig(trials=3, search="random"), SPACE, seed=0)
    prepare_search(ledger, SweepConfig(trials=6, search="random"), SPACE, seed=0)
    prepare_search(more, SweepConfig(trials=6, search="random"), SPACE, seed=0)
    assert [trial.drawn for trial in ledger.trials] == [trial.drawn for trial in more.trials]


def test_a_grid_is_as_long_as_its_points(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    prepare_search(ledger, SweepConfig(trials=50, search="grid"), read_space(CHOICES, BASE), seed=0)
    assert len({tuple(trial.drawn.items()) for trial in ledger.trials}) == len(ledger.trials) == 6


def test_optuna_continues_from_the_ledgers_results_and_proposes_nothing_twice(tmp_path: Path) -> None:
    settings = SweepConfig(trials=8)
    ledger = ledger_in(tmp_path)
    proposals = LedgerSearch(ledger, [], prepare_search(ledger, settings, SPACE, seed=0), 8, MEAN_RECALL, 0, nobody)
    first = [run(proposals, f"a{i}", {60: i / 10}, ended=True)["drawn"] for i in range(4)]
    proposals.suggest("a4")
    proposals.on_trial_result("a4", {"step": 15, MEAN_RECALL: 0.1})  # now the driver is killed

    again = ledger_in(tmp_path, resumed=True)
    search = prepare_search(again, settings, SPACE, seed=0)
    assert len(search._ot_study.trials) == 4
    proposals = LedgerSearch(again, again.unfinished, search, 8, MEAN_RECALL, 0, nobody)
    second = [run(proposals, f"b{i}", {60: i / 10}, ended=True)["drawn"] for i in range(4)]
    assert len(search._ot_study.trials) == 8
    assert proposals.suggest("c") == Searcher.FINISHED
    assert len({tuple(drawn.items()) for drawn in first + second}) == 8
    assert second[0] == ledger.trials[4].drawn


def test_a_resumed_asha_remembers_its_rungs(tmp_path: Path) -> None:
    settings = SweepConfig(trials=8, search="random")
    ledger = ledger_in(tmp_path)
    prepare_search(ledger, settings, SPACE, seed=0)
    for trial, value in zip(ledger.trials, (0.4, 0.5, 0.6), strict=False):
        trial.values, trial.status = {15: value}, "stopped"
    scheduler = build_scheduler(settings, [15, 30], 60, ledger)
    assert scheduler is not None
    rungs = dict(scheduler._brackets[0]._rungs)
    assert sorted(rungs[15].values()) == [0.4, 0.5, 0.6]
    assert not rungs[30]


def test_a_resumed_trial_counts_once_at_each_rung_with_its_value_there(tmp_path: Path) -> None:
    settings = SweepConfig(trials=2, search="random")
    ledger = ledger_in(tmp_path)
    prepare_search(ledger, settings, SPACE, seed=0)
    ledger.trials[0].values, ledger.trials[0].status = {15: 0.1, 30: 0.2}, "running"
    scheduler = build_scheduler(settings, [15, 30], 60, ledger)
    assert scheduler is not None
    trial: Any = SimpleNamespace(trial_id="new", config={"number": 0})
    scheduler.on_trial_add(None, trial)
    for step, value in ((30, 0.2), (45, 0.4), (120, 0.5)):  # far beyond the base's length too
        assert scheduler.on_trial_result(None, trial, {"step": step, MEAN_RECALL: value}) == TrialScheduler.CONTINUE
    rungs = dict(scheduler._brackets[0]._rungs)
    assert (rungs[15], rungs[30]) == ({"new": 0.1}, {"new": 0.2})


def test_finalists_run_again_with_other_seeds_and_the_best_mean_wins(tmp_path: Path) -> None:
    settings = SweepConfig(trials=3, search="random", finalists=2, repeats=2)
    ledger = ledger_in(tmp_path)
    prepare_search(ledger, settings, SPACE, seed=7)
    proposals = LedgerSearch(ledger, ledger.unfinished, None, 3, MEAN_RECALL, 7, nobody)
    for name, value in zip("abc", (0.30, 0.10, 0.28), strict=True):
        run(proposals, name, {60: value}, ended=True)
    assert [trial.number for trial in ledger.ranked()] == [0, 2, 1]
    add_repeats(ledger, settings)
    repeats = ledger.trials[3:]
    assert [(trial.repeats, trial.seed) for trial in repeats] == [(0, 8), (0, 9), (2, 8), (2, 9)]
    proposals = LedgerSearch(ledger, ledger.unfinished, None, 3, MEAN_RECALL, 7, nobody)
    for name, value in zip("defg", (0.10, 0.20, 0.28, 0.25), strict=True):
        run(proposals, name, {60: value}, ended=True)
    best, second = ledger.finalist_scores(2)
    assert (best.trial.number, best.mean) == (2, pytest.approx(0.27))
    assert (second.trial.number, second.mean) == (0, pytest.approx(0.20))
    assert best.spread == pytest.approx(0.017320508)
    add_repeats(ledger, settings)
    assert len(ledger.trials) == 7  # none is missing


def test_a_lost_trial_is_reported_and_failed_ones_are_retried_on_request(tmp_path: Path) -> None:
    settings, lost = SweepConfig(trials=2, search="random"), list[int]()
    ledger = ledger_in(tmp_path)
    prepare_search(ledger, settings, SPACE, seed=0)
    proposals = LedgerSearch(ledger, ledger.unfinished, None, 2, MEAN_RECALL, 0, lost.append)
    run(proposals, "a", {15: 0.1, 60: 0.3}, ended=True)
    proposals.suggest("b")
    proposals.on_trial_complete("b", None, error=True)
    assert lost == [1]
    assert [(trial.status, trial.reason) for trial in ledger.trials] == [("finished", None), ("failed", LOST_TOO_OFTEN)]
    again = ledger_in(tmp_path, resumed=True)
    assert not again.unfinished
    again.retry_failed()
    assert [(trial.number, trial.reason) for trial in again.unfinished] == [(1, None)]
