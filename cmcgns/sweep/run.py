"""The driver of `jobs/sweep.py`: trials by Tune, the best ones again with other seeds, and the answer."""

import json
import logging
import math
import os
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from rich.console import Console

from cmcgns.clustering.kmeans import check_faiss
from cmcgns.command_line import STATUS_FAILED, STATUS_INTERRUPTED, to_yaml
from cmcgns.config import Config, RunConfig
from cmcgns.data import storage
from cmcgns.errors import UserError, cause
from cmcgns.run_folder import RunFolder, open_folder, refuse_changes, warn_of_passing_folder
from cmcgns.session import ray_session
from cmcgns.sweep.job_config import SweepConfig, SweepJobConfig
from cmcgns.sweep.ledger import DONE, Ledger, Trial
from cmcgns.sweep.measures import measure
from cmcgns.sweep.proposals import Proposals
from cmcgns.sweep.report import Answer, write_answer, write_table
from cmcgns.sweep.resources import TRIAL_CPUS, Room, nodes_of_cluster, room_for
from cmcgns.sweep.search import grid_axes, searcher
from cmcgns.sweep.space import Space, default_space, read_space
from cmcgns.sweep.table import SweepTable, Watch, settings_line
from cmcgns.sweep.trial import SweepTrial, TrialTask, finished_before
from cmcgns.terminal import console, log_on, print_plan, quiet_terminal
from cmcgns.train.folder import FREE_TO_CHANGE, with_absolute_paths
from cmcgns.train.opened import Materials, make_materials
from cmcgns.train.plan import check_cpus
from cmcgns.train.run import worker_variables
from cmcgns.train.schedule import build_schedule

logger = logging.getLogger(__name__)

TUNE_VARIABLES = {
    # a trial that fails reports no metric, and Ctrl-C is ours
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the other output prints at verbose=0 too
}
FREE = FREE_TO_CHANGE | {"sweep": {"trials", "max_concurrent", "finalists", "repeats", "resume"}}
LOST_TRIALS = 2
"""Times that Tune starts a trial again whose own process is lost with its node."""


def sweep(config: SweepJobConfig) -> int:
    """Exit status of one sweep: 0 finished, 1 no trial did, 130 stopped by the user."""
    terminal, settings = console(), config.sweep
    run = config.run.model_copy(update={"name": None, "resume": settings.resume}) if settings.resume else config.run
    folder, config = open_folder(run, "sweep", "sweep.resume"), with_absolute_paths(config)
    if folder.resumed:
        refuse_changes(config, folder, FREE)
    base = config.pretraining().model_copy(update={"run": RunConfig()})
    check_faiss(base.clustering.device)
    if settings.space is not None:
        read_space(settings.space, base)  # before the corpus is read
    materials = make_materials(with_any_clusters(base, settings))
    check_corpus(folder, materials, base)
    written = settings.space or default_space(min(materials.sentences, base.clustering.bank_size))
    space = read_space(written, base)
    total = build_schedule(base.train, len(materials.corpus.train)).total
    base, rungs = with_rungs(base, settings, total)
    ledger, runs = Ledger(folder), storage.join(folder.uri, "trials")
    take_up_ended(ledger, runs, settings.metric)
    search = propose(ledger, settings, space, base.train.seed)
    os.environ.update(TUNE_VARIABLES)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the table says what failed, and why
    with quiet_terminal(), log_on(terminal), ray_session(worker_variables(base)) as cpus:
        check_cpus(base, cpus)
        most = settings.trials if search is not None else len(ledger.first_runs)
        room = room_for(base, nodes_of_cluster(), min(settings.max_concurrent or most, most))
        print_plan(terminal, describe_plan(folder, base, settings, written, materials, rungs, room, total))
        warn_of_passing_folder(terminal, folder)
        if not folder.resumed:
            folder.write_json("corpus.json", {"digest": materials.corpus.digest})
            storage.write_bytes(folder.file("config.yaml"), to_yaml(config).encode())
        ledger.save()
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        watch = ray.remote(Watch).options(num_cpus=0, label_selector=here).remote()
        task = TrialTask(base, runs, settings.metric, ray.put(materials), room.share, watch)
        table = SweepTable(ledger, watch, settings.metric, terminal)
        began = time.time()
        try:
            run_trials(task, ledger, search, settings, room, scheduler_of(settings, rungs, total, ledger))
            add_repeats(ledger, settings)
            run_trials(task, ledger, None, settings, room, None)
            write_table(ledger, base, settings.metric, folder)
            answer = answer_of(ledger, settings, runs, materials)
        except KeyboardInterrupt:
            write_table(ledger, base, settings.metric, folder)
            table.close()
            terminal.print(f"stopped; go on with: {again(folder)}", highlight=False)
            return STATUS_INTERRUPTED
        finally:
            table.close()
        return conclude(terminal, folder, base, settings, space, ledger, answer, time.time() - began)


def with_any_clusters(base: Config, settings: SweepConfig) -> Config:
    """``base`` for a look at the corpus: where clusters are drawn, no trial has its own number of them."""
    if settings.space is not None and "objective.num_clusters" not in settings.space:
        return base
    return base.model_copy(update={"objective": base.objective.model_copy(update={"num_clusters": 2})})


def check_corpus(folder: RunFolder, materials: Materials, base: Config) -> None:
    """Refuse to go on with a sweep on another corpus than it began with: its trials would not compare."""
    if not folder.resumed:
        return
    before = json.loads(storage.read_bytes(folder.file("corpus.json")))["digest"]
    if before != materials.corpus.digest:
        raise UserError(
            f"sweep.resume {folder.name}: data.uri {base.data.uri} no longer holds the studies that the sweep began with "
            f"({materials.corpus.digest} instead of {before})"
        )


def with_rungs(base: Config, settings: SweepConfig, total: int) -> tuple[Config, list[int]]:
    """``base`` with validations at the rungs, and the steps of those."""
    if settings.scheduler == "none":
        return base, []
    first = max(round(settings.first_rung * total), 1)
    every = base.train.validate_every
    if every is None or first % every:
        base = base.model_copy(update={"train": base.train.model_copy(update={"validate_every": first})})
    rungs = [first]
    while rungs[-1] * settings.reduction_factor < total:
        rungs.append(rungs[-1] * settings.reduction_factor)
    return base, rungs


def propose(ledger: Ledger, settings: SweepConfig, space: Space, seed: int) -> Any:
    """The search that goes by results; what needs none is drawn into the ledger at once, and nobody searches on."""
    known = len(ledger.first_runs)
    if settings.search == "optuna":
        # with the seed it began with, a search that goes on would propose again what it began with
        search = searcher("optuna", space, settings.metric, settings.trials, settings.seed + known)
        for trial in ledger.first_runs:
            if trial.value is not None and trial.status in ("finished", "stopped"):
                search.add_evaluated_point(trial.drawn, trial.value)
        return search
    search = searcher(settings.search, space, settings.metric, settings.trials, settings.seed)
    points = math.prod(map(len, grid_axes(space).values())) if settings.search == "grid" else settings.trials
    for number in range(min(settings.trials, points)):
        drawn = search.suggest(str(number))
        if number >= known:
            ledger.trials.append(Trial(len(ledger.trials), drawn, seed))
    return None


def take_up_ended(ledger: Ledger, runs: str, metric: str) -> None:
    """Note what ended while nobody was there to write it down."""
    for trial in ledger.unfinished:
        before = finished_before(runs, trial.folder, metric)
        if before is not None:
            trial.status, trial.step = "finished", before["step"]
            trial.values[trial.step] = before[metric]


def scheduler_of(settings: SweepConfig, rungs: list[int], total: int, ledger: Ledger) -> TrialScheduler | None:
    """ASHA over optimizer steps, which knows what trials of the ledger have reached at its rungs."""
    if settings.scheduler == "none":
        return None
    scheduler = LedgerAsha(
        ledger,
        time_attr="step",
        metric=settings.metric,
        mode="max",
        grace_period=rungs[0],
        reduction_factor=settings.reduction_factor,
        max_t=total,
        stop_last_trials=False,  # a trial ends by itself, with an export
    )
    for trial in ledger.first_runs:
        if trial.status in DONE:
            scheduler.on_trial_add(
                None, SimpleNamespace(trial_id=f"before-{trial.number}", config={"number": trial.number})
            )
    return scheduler


class LedgerAsha(AsyncHyperBandScheduler):
    """ASHA that gives each trial the values which the ledger has for it already: of an earlier driver's time."""

    def __init__(self, ledger: Ledger, **settings: Any) -> None:
        super().__init__(**settings)
        self.ledger = ledger

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial begins or goes on."""
        super().on_trial_add(tune_controller, trial)
        for step, value in sorted(self.ledger.trials[trial.config["number"]].values.items()):
            self.on_trial_result(tune_controller, trial, {"step": step, self.metric: value})


def run_trials(
    task: TrialTask, ledger: Ledger, search: Any, settings: SweepConfig, room: Room, scheduler: TrialScheduler | None
) -> None:
    """Run what ``search`` proposes beside the trials that wait in the ledger; without a ``scheduler`` repetitions too."""
    waiting = [trial for trial in ledger.unfinished if trial.repeats is None or scheduler is None]
    number = len(waiting) + (max(settings.trials - len(ledger.first_runs), 0) if search is not None else 0)
    if not number:
        return
    proposals = Proposals(ledger, waiting, search, settings.trials, settings.metric, task.base.train.seed)
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
    for trial in ledger.ranked()[: settings.finalists]:
        there = sum(other.repeats == trial.number for other in ledger.trials)
        for again in range(there, settings.repeats):
            ledger.add(trial.drawn, trial.seed + 1 + again, repeats=trial.number)


def answer_of(ledger: Ledger, settings: SweepConfig, runs: str, materials: Materials) -> Answer | None:
    """The finalists by the mean over their seeds, each with its metric on the test split; None where no trial finished."""
    standings = ledger.standings(settings.finalists)
    if not standings:
        return None
    tests: list[float | None] = [None] * len(standings)
    if len(materials.corpus.index.split("test")):
        for place, standing in enumerate(standings):  # one after the other: each needs a CPU beside those of its data
            uri = storage.join(runs, standing.trial.folder)
            try:
                tests[place] = measure(settings.metric, ray.get(test_scores.remote(uri)))
            except ray.exceptions.RayError as error:
                logger.warning("trial %d has no score on the test split: %s", standing.trial.number, cause(error))
    return Answer(standings, tests)


@ray.remote(num_cpus=1)
def test_scores(uri: str) -> dict[str, Any]:
    """Retrieval by the run in the folder ``uri`` on its corpus's test split."""
    from cmcgns.evaluate.retrieval import retrieval  # torch, which the driver does without

    return retrieval(uri, "test")


def describe_plan(
    folder: RunFolder,
    base: Config,
    settings: SweepConfig,
    written: dict[str, Any],
    materials: Materials,
    rungs: list[int],
    room: Room,
    total: int,
) -> dict[str, str]:
    """What is about to be tried."""
    corpus = materials.corpus
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
            for key, form in written.items()
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


def conclude(
    terminal: Console, folder: RunFolder, base: Config, settings: SweepConfig, space: Space, ledger: Ledger,
    answer: Answer | None, seconds: float,
) -> int:  # fmt: skip
    """Write the answer, say it; the exit status."""
    write_table(ledger, base, settings.metric, folder)
    counts = {status: sum(t.status == status for t in ledger.trials) for status in ("finished", "stopped", "failed")}
    result: dict[str, Any] = {"status": "finished" if answer else "failed", "seconds": round(seconds, 1), **counts}
    if answer is None:
        folder.write_json("result.json", result)
        reasons = {trial.reason for trial in ledger.trials if trial.reason}
        terminal.print(
            f"failed: no trial finished: {'; '.join(sorted(reasons))}", style="red", highlight=False, markup=False
        )
        return STATUS_FAILED
    write_answer(folder, base, settings.metric, space, ledger, answer)
    folder.write_json("result.json", result | answer.as_json(settings.metric))
    facts = {"finished": ", ".join(f"{number} {status}" for status, number in counts.items()) + f", {seconds:.0f} s"}
    for place, trial in enumerate(ledger.ranked()[:3], 1):
        standing = ledger.standing(trial)
        spread = "" if standing.spread is None else f" (mean {standing.mean:.4f} ± {standing.spread:.4f} of "
        spread += f"{len(standing.values)} seeds)" if spread else ""
        facts[f"{place}."] = (
            f"trial {trial.number}: {settings.metric} {trial.value:.4f}{spread}; {settings_line(trial)}"
        )
    if answer.tests[0] is not None:
        facts["on test"] = f"{settings.metric} {answer.tests[0]:.4f} by the winner, trial {answer.winner.number}"
    facts["table"] = f"{folder.file('trials.csv')}, report.html and sweep.png beside it"
    facts["pictures"] = f"tensorboard --logdir {folder.file('tensorboard')}"
    facts["run the best"] = f"python jobs/pretrain.py --config {folder.file('best.yaml')}"
    print_plan(terminal, facts)
    return 0
