"""Driver of `jobs/sweep.py`: trials by Tune, finalists again with other seeds, and the result."""

import logging
import os
import time
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler
from rich.console import Console

from cmcgns import storage
from cmcgns.cluster.placement import this_node
from cmcgns.cluster.session import ONE_CPU
from cmcgns.config import foreign_modules
from cmcgns.errors import cause
from cmcgns.job import Job
from cmcgns.measures import measure
from cmcgns.sweep.admission import TRIAL_CPUS, Capacity, build_scheduler, capacity_for, node_resources, trial_bundles
from cmcgns.sweep.config import SweepConfig, SweepJobConfig
from cmcgns.sweep.ledger import Ledger
from cmcgns.sweep.report import SweepResult, write_result, write_table
from cmcgns.sweep.search import LedgerSearch
from cmcgns.sweep.setup import Sweep, setup_sweep, write_start
from cmcgns.sweep.table import SweepMonitor, SweepTable, settings_line
from cmcgns.sweep.trial import SweepTrial, TrialTask
from cmcgns.train.run import check_cpus, worker_variables

logger = logging.getLogger(__name__)
TUNE_VARIABLES = {
    # a failed trial reports no metric; we handle Ctrl-C ourselves
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints even with verbose=0
}

MAX_TUNE_RETRIES = 2
"""How often Tune restarts a trial whose Tune process was lost with its node."""


class SweepJob(Job):
    """Trials by Tune, the finalists again with other seeds, and the result."""

    script = "sweep"
    resume_key = "sweep.resume"
    resumes_from = "the last validations"

    def __init__(self, config: SweepJobConfig) -> None:
        self.setup = setup_sweep(config)
        self.folder = self.setup.folder
        os.environ.update(TUNE_VARIABLES)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the table shows failures and their reasons
        self.answer: SweepResult | None = None

    def environment(self) -> dict[str, str]:
        return worker_variables(self.setup.base)

    def uris(self) -> list[str]:
        return [self.setup.base.data.uri, self.folder.storage]

    def needed(self) -> list[dict[str, float]]:
        return [*trial_bundles(self.setup.base), ONE_CPU]

    def modules(self) -> dict[str, str]:
        return foreign_modules(self.setup.base.model_dump())

    def plan(self, cpus: float) -> dict[str, str]:
        check_cpus(self.setup.base)
        return describe_plan(self.setup, self._capacity())

    def _capacity(self) -> Capacity:
        settings, ledger = self.setup.settings, self.setup.ledger
        most = settings.trials if self.setup.search is not None else len(ledger.first_runs)
        return capacity_for(self.setup.base, node_resources(), min(settings.max_concurrent or most, most))

    def run(self, terminal: Console) -> dict[str, Any]:
        setup, metric, capacity = self.setup, self.setup.settings.metric, self._capacity()
        ledger, settings, base = setup.ledger, setup.settings, setup.base
        write_start(setup)
        get_capacity = lambda: capacity_for(base, node_resources(), capacity.trials)
        monitor = ray.remote(SweepMonitor).options(num_cpus=0, label_selector=this_node()).remote(get_capacity)
        task = TrialTask(base, setup.runs, metric, ray.put(setup.prepared), monitor)
        table, began = SweepTable(ledger, monitor, metric, terminal), time.time()
        try:
            run_trials(setup, task, capacity, setup.search, build_scheduler(settings, setup.rungs, setup.total, ledger))
            add_repeats(ledger, settings)
            run_trials(setup, task, capacity, None, None)
            write_table(ledger, base, metric, self.folder)
            self.answer = rank_finalists(setup)
        except KeyboardInterrupt:
            write_table(ledger, base, metric, self.folder)
            raise
        finally:
            table.close()
        counts = {
            status: sum(t.status == status for t in ledger.trials) for status in ("finished", "stopped", "failed")
        }
        result: dict[str, Any] = {"seconds": round(time.time() - began, 1), **counts}
        if self.answer is None:
            reasons = {trial.reason for trial in ledger.trials if trial.reason}
            return result | {"status": "failed", "failure": f"no trial finished: {'; '.join(sorted(reasons))}"}
        write_result(self.folder, base, metric, setup.space, ledger, self.answer)
        return result | self.answer.as_json(metric)

    def summary(self, result: dict[str, Any]) -> dict[str, str]:
        answer, ledger, folder, metric = self.answer, self.setup.ledger, self.folder, self.setup.settings.metric
        assert answer is not None
        counts = ", ".join(f"{result[status]} {status}" for status in ("finished", "stopped", "failed"))
        facts = {"finished": f"{counts}, {result['seconds']:.0f} s"}
        finalists = [scores.trial for scores in answer.finalist_scores]
        others = [trial for trial in ledger.ranked() if trial not in finalists]
        for place, trial in enumerate([*finalists, *others][:3], 1):
            scores = ledger.scores_of(trial)
            spread = "" if scores.spread is None else f" (mean {scores.mean:.4f} ± {scores.spread:.4f} of "
            spread += f"{len(scores.values)} seeds)" if spread else ""
            facts[f"{place}."] = f"trial {trial.number}: {metric} {trial.value:.4f}{spread}; {settings_line(trial)}"
        if answer.tests[0] is not None:
            facts["on test"] = f"{metric} {answer.tests[0]:.4f} of the winner, trial {answer.winner.number}"
        return facts | {
            "table": f"{folder.file('trials.csv')}, with report.html and sweep.png",
            "pictures": f"tensorboard --logdir {folder.file('tensorboard')}",
            "run the best": f"python jobs/pretrain.py --config {folder.file('best.yaml')}",
        }


def run_trials(
    setup: Sweep, task: TrialTask, capacity: Capacity, search: Any, scheduler: TrialScheduler | None
) -> None:
    """Run the waiting trials of the ledger and those that ``search`` proposes; repetitions only without a ``scheduler``."""
    ledger, settings = setup.ledger, setup.settings
    waiting = [trial for trial in ledger.unfinished if trial.repeats is None or scheduler is None]
    number = len(waiting) + (max(settings.trials - len(ledger.first_runs), 0) if search is not None else 0)
    if not number:
        return
    ray.get(task.monitor.clear.remote())
    seed = task.base.train.seed
    searcher = LedgerSearch(ledger, waiting, search, settings.trials, settings.metric, seed, task.monitor.leave.remote)
    with storage.scratch_folder() as scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(SweepTrial, task=task), {"CPU": TRIAL_CPUS}),
            tune_config=tune.TuneConfig(
                search_alg=searcher, scheduler=scheduler, num_samples=number, max_concurrent_trials=capacity.trials
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=MAX_TUNE_RETRIES),
            ),
        )
        tuner.fit()


def add_repeats(ledger: Ledger, settings: SweepConfig) -> None:
    """Add the finalists' missing repetitions to the ledger."""
    for trial, again in ledger.missing_repeats(settings.finalists, settings.repeats):
        ledger.add(trial.drawn, trial.seed + 1 + again, repeats=trial.number)


def rank_finalists(setup: Sweep) -> SweepResult | None:
    """The finalists, best mean over their seeds first, with their metric on the test split; None if no trial finished."""
    finalists = setup.ledger.finalist_scores(setup.settings.finalists)
    if not finalists:
        return None
    tests: list[float | None] = [None] * len(finalists)
    if setup.prepared.corpus.has_test:
        use_gpu = setup.base.train.use_gpu
        scores_of = test_scores.options(num_gpus=int(use_gpu))
        for i, scores in enumerate(finalists):  # one at a time: each needs a CPU in addition to its data tasks
            uri = storage.join(setup.runs, scores.trial.folder)
            try:
                tests[i] = measure(setup.settings.metric, ray.get(scores_of.remote(uri, use_gpu)))
            except ray.exceptions.RayError as error:
                logger.warning("trial %d has no score on the test split: %s", scores.trial.number, cause(error))
    return SweepResult(finalists, tests)


@ray.remote(num_cpus=1)
def test_scores(uri: str, use_gpu: bool) -> dict[str, Any]:
    """Retrieval scores of the run in folder ``uri`` on its corpus's test split."""
    from cmcgns.evaluate.tasks.retrieval import retrieval
    from cmcgns.models.device import device_of

    return retrieval(uri, "test", device_of(use_gpu))


def describe_plan(setup: Sweep, capacity: Capacity) -> dict[str, str]:
    """What the sweep will run."""
    corpus, settings, folder = setup.prepared.corpus, setup.settings, setup.folder
    rungs, total, base = setup.rungs, setup.total, setup.base
    stopping = (
        f"asha at steps {', '.join(map(str, rungs))} of {total}, validations every {base.train.validate_every}"
        if rungs
        else f"none; {total} steps each"
    )
    return {
        "sweep": f"{folder.uri}{' (resumed)' if folder.resumed else ''}",
        "data": f"{corpus.source.uri}: {len(corpus.train)} training, {len(corpus.valid)} validation studies, indexed once",
        "trials": f"{settings.trials} by {settings.search}; the best {settings.finalists} with {settings.repeats} more seeds",
        "space": "; ".join(
            f"{key} {name} {', '.join(map(str, values))}"
            for key, form in setup.written.items()
            for name, values in form.items()
        ),
        "metric": f"{settings.metric} on the validation split",
        "stopping": stopping,
        "cluster": f"{capacity.share.all:g} CPUs: {capacity.trials} trials at the same time, each with "
        f"{capacity.share.data:.2g} CPUs for data",
    }
