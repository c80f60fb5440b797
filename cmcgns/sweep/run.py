"""The driver of `jobs/sweep.py`: trials by Tune, the best ones again with other seeds, and the answer."""

import logging
import os
import tempfile
import time
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler
from rich.console import Console

from cmcgns import storage
from cmcgns.cli import STATUS_FAILED, STATUS_INTERRUPTED
from cmcgns.cluster.placement import this_node
from cmcgns.cluster.session import ONE_CPU, ray_session
from cmcgns.config import measure
from cmcgns.errors import cause
from cmcgns.run_folder import RunFolder, warn_of_passing_folder
from cmcgns.sweep.admission import TRIAL_CPUS, Room, nodes_of_cluster, room_for, scheduler_of, trial_bundles
from cmcgns.sweep.config import SweepConfig, SweepJobConfig
from cmcgns.sweep.ledger import Ledger
from cmcgns.sweep.report import Answer, write_answer, write_table
from cmcgns.sweep.search import Proposals
from cmcgns.sweep.setup import Sweep, setup_sweep, write_start
from cmcgns.sweep.table import SweepTable, Watch, settings_line
from cmcgns.sweep.trial import SweepTrial, TrialTask
from cmcgns.terminal import console, log_on, print_plan, quiet_terminal
from cmcgns.train.run import check_cpus, worker_variables

logger = logging.getLogger(__name__)
TUNE_VARIABLES = {
    # a trial that fails reports no metric, and Ctrl-C is ours
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the other output prints at verbose=0 too
}

LOST_TRIALS = 2
"""Times that Tune starts a trial again whose own process is lost with its node."""


def sweep(config: SweepJobConfig) -> int:
    """Exit status of one sweep: 0 finished, 1 no trial did, 130 stopped by the user."""
    terminal, opened = console(), setup_sweep(config)
    ledger, settings, folder, metric = opened.ledger, opened.settings, opened.folder, opened.settings.metric
    os.environ.update(TUNE_VARIABLES)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the table says what failed, and why
    uris = [opened.base.data.uri, folder.storage]
    with (
        quiet_terminal(),
        log_on(terminal),
        ray_session(worker_variables(opened.base), uris, [*trial_bundles(opened.base), ONE_CPU]),
    ):
        check_cpus(opened.base)
        most = settings.trials if opened.search is not None else len(ledger.first_runs)
        room = room_for(opened.base, nodes_of_cluster(), min(settings.max_concurrent or most, most))
        print_plan(terminal, describe_plan(opened, room))
        warn_of_passing_folder(terminal, folder)
        write_start(opened)
        base, at_once = opened.base, room.trials
        count = lambda: room_for(base, nodes_of_cluster(), at_once)
        watch = ray.remote(Watch).options(num_cpus=0, label_selector=this_node()).remote(count)
        task = TrialTask(base, opened.runs, metric, ray.put(opened.materials), watch)
        table, began = SweepTable(ledger, watch, metric, terminal), time.time()
        try:
            run_trials(opened, task, room, opened.search, scheduler_of(settings, opened.rungs, opened.total, ledger))
            add_repeats(ledger, settings)
            run_trials(opened, task, room, None, None)
            write_table(ledger, opened.base, metric, folder)
            answer = answer_of(opened)
            table.close()
            return conclude(terminal, opened, answer, time.time() - began)
        except KeyboardInterrupt:
            write_table(ledger, opened.base, metric, folder)
            table.close()
            terminal.print(f"stopped; go on with: {again(folder)}", highlight=False)
            return STATUS_INTERRUPTED
        finally:
            table.close()


def run_trials(opened: Sweep, task: TrialTask, room: Room, search: Any, scheduler: TrialScheduler | None) -> None:
    """Run what ``search`` proposes beside the trials that wait in the ledger; without a ``scheduler`` repetitions too."""
    ledger, settings = opened.ledger, opened.settings
    waiting = [trial for trial in ledger.unfinished if trial.repeats is None or scheduler is None]
    number = len(waiting) + (max(settings.trials - len(ledger.first_runs), 0) if search is not None else 0)
    if not number:
        return
    ray.get(task.watch.empty.remote())
    seed = task.base.train.seed
    proposals = Proposals(ledger, waiting, search, settings.trials, settings.metric, seed, task.watch.leave.remote)
    with tempfile.TemporaryDirectory(prefix="cmcgns-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(SweepTrial, task=task), {"CPU": TRIAL_CPUS}),
            tune_config=tune.TuneConfig(
                search_alg=proposals, scheduler=scheduler, num_samples=number, max_concurrent_trials=room.trials
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=LOST_TRIALS),
            ),
        )
        tuner.fit()


def add_repeats(ledger: Ledger, settings: SweepConfig) -> None:
    """Put what is missing of the finalists' repetitions into the ledger."""
    for trial, again in ledger.missing_repeats(settings.finalists, settings.repeats):
        ledger.add(trial.drawn, trial.seed + 1 + again, repeats=trial.number)


def answer_of(opened: Sweep) -> Answer | None:
    """The finalists by the mean over their seeds, each with its metric on the test split; None where no trial finished."""
    standings = opened.ledger.standings(opened.settings.finalists)
    if not standings:
        return None
    tests: list[float | None] = [None] * len(standings)
    if len(opened.materials.corpus.index.split("test")):
        for place, standing in enumerate(standings):  # one after the other: each needs a CPU beside those of its data
            uri = storage.join(opened.runs, standing.trial.folder)
            try:
                tests[place] = measure(opened.settings.metric, ray.get(test_scores.remote(uri)))
            except ray.exceptions.RayError as error:
                logger.warning("trial %d has no score on the test split: %s", standing.trial.number, cause(error))
    return Answer(standings, tests)


@ray.remote(num_cpus=1)
def test_scores(uri: str) -> dict[str, Any]:
    """Retrieval by the run in the folder ``uri`` on its corpus's test split."""
    from cmcgns.evaluate.tasks.retrieval import retrieval

    return retrieval(uri, "test")


def describe_plan(opened: Sweep, room: Room) -> dict[str, str]:
    """What is about to be tried."""
    corpus, settings, folder = opened.materials.corpus, opened.settings, opened.folder
    rungs, total, base = opened.rungs, opened.total, opened.base
    stopping = (
        f"asha at steps {', '.join(map(str, rungs))} of {total}, validations every {base.train.validate_every}"
        if rungs
        else f"none; {total} steps each"
    )
    return {
        "sweep": f"{folder.uri}{' (resumed)' if folder.resumed else ''}",
        "data": f"{corpus.source.uri}: {len(corpus.train)} training, {len(corpus.valid)} validation studies, indexed once",
        "trials": f"{settings.trials} by {settings.search}, the best {settings.finalists} {settings.repeats} times again",
        "space": "; ".join(
            f"{key} {name} {', '.join(map(str, values))}"
            for key, form in opened.written.items()
            for name, values in form.items()
        ),
        "metric": f"{settings.metric} on the validation split",
        "stopping": stopping,
        "cluster": f"{room.share.all:g} CPUs: {room.trials} trials at the same time, {room.share.data:.2g} CPUs for the data "
        "of each",
    }


def again(folder: RunFolder) -> str:
    """The command that goes on with a sweep."""
    return f"python jobs/sweep.py --run.storage={folder.storage} --sweep.resume={folder.name}"


def conclude(terminal: Console, opened: Sweep, answer: Answer | None, seconds: float) -> int:
    """Write the answer, say it; the exit status."""
    ledger, folder, metric = opened.ledger, opened.folder, opened.settings.metric
    counts = {status: sum(t.status == status for t in ledger.trials) for status in ("finished", "stopped", "failed")}
    result: dict[str, Any] = {"status": "finished" if answer else "failed", "seconds": round(seconds, 1), **counts}
    if answer is None:
        folder.write_json("result.json", result)
        reasons = {trial.reason for trial in ledger.trials if trial.reason}
        terminal.print(
            f"failed: no trial finished: {'; '.join(sorted(reasons))}", style="red", highlight=False, markup=False
        )
        return STATUS_FAILED
    write_answer(folder, opened.base, metric, opened.space, ledger, answer)
    folder.write_json("result.json", result | answer.as_json(metric))
    facts = {"finished": ", ".join(f"{number} {status}" for status, number in counts.items()) + f", {seconds:.0f} s"}
    finalists = [standing.trial for standing in answer.standings]
    others = [trial for trial in ledger.ranked() if trial not in finalists]
    for place, trial in enumerate([*finalists, *others][:3], 1):
        standing = ledger.standing(trial)
        spread = "" if standing.spread is None else f" (mean {standing.mean:.4f} ± {standing.spread:.4f} of "
        spread += f"{len(standing.values)} seeds)" if spread else ""
        facts[f"{place}."] = f"trial {trial.number}: {metric} {trial.value:.4f}{spread}; {settings_line(trial)}"
    if answer.tests[0] is not None:
        facts["on test"] = f"{metric} {answer.tests[0]:.4f} by the winner, trial {answer.winner.number}"
    facts["table"] = f"{folder.file('trials.csv')}, report.html and sweep.png beside it"
    facts["pictures"] = f"tensorboard --logdir {folder.file('tensorboard')}"
    facts["run the best"] = f"python jobs/pretrain.py --config {folder.file('best.yaml')}"
    print_plan(terminal, facts)
    return 0
