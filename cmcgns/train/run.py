"""The pretraining job: resource checks, the plan, the run and its result."""

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import psutil
import ray
from rich.console import Console

from cmcgns import storage
from cmcgns.bad_rows import read_bad_rows, write_bad_rows
from cmcgns.cli import invocation
from cmcgns.cluster.coordinator import log_to_coordinator, memory_failure, read_account, start_coordinator
from cmcgns.cluster.placement import (
    DATA,
    NODE_START_S,
    ROLE,
    Node,
    can_scale_up,
    data_nodes,
    describe_placement,
    describe_request,
    list_nodes,
    run_bundles,
)
from cmcgns.cluster.session import ONE_CPU
from cmcgns.config import Config, foreign_modules
from cmcgns.data.stream import default_read_ahead
from cmcgns.errors import UserError, last_line
from cmcgns.job import STATUS, Job, run
from cmcgns.run_folder import RunFolder
from cmcgns.train.display import Display, stop_on_interrupt
from cmcgns.train.resume import (
    delete_half_written,
    end_last_attempt,
    latest_checkpoint,
    list_checkpoints,
    write_snapshot,
)
from cmcgns.train.setup import Corpus, Pretraining, setup_pretraining, write_start

logger = logging.getLogger(__name__)
LOOK_S, STARVED_S = 2.0, 30.0


def check_cpus(config: Config) -> None:
    """Raise ``UserError`` with the numbers if workers and clustering need more GPUs than there are, or leave no CPU for data."""
    train, clustering, resources = config.train, config.clustering, ray.cluster_resources()
    workers = train.least_workers
    taken, cpus, gpus = reserved_cpus(config, workers), resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    if taken > cpus - 1:
        raise UserError(
            f"{workers} workers of {train.cpus_per_worker} and {config.pool_actors} clustering actors of "
            f"{clustering.cpus_per_actor} need {taken:g} CPUs; the cluster has {cpus:g} and one is reserved for data. "
            "Lower train.cpus_per_worker or clustering.cpus_per_actor"
        )
    wanted = workers * train.use_gpu + config.pool_actors * clustering.gpus_per_actor
    if wanted > gpus:
        raise UserError(f"workers and clustering need {wanted:g} GPUs; the cluster has {gpus:g}. See train.use_gpu")


def check_data_nodes(config: Config, nodes: Sequence[Node]) -> None:
    """Raise ``UserError`` if the clustering pool fills the nodes labelled for data: data tasks run only there."""
    labelled = data_nodes(nodes)
    if labelled and whole_cluster(config, nodes, config.train.least_workers).data < 1:
        clustering = config.clustering
        raise UserError(
            f"the {len(labelled)} nodes labelled {ROLE}={DATA} have {sum(node.cpus for node in labelled):g} CPUs, and "
            f"{config.pool_actors} clustering actors of {clustering.cpus_per_actor} leave less than one of them for data. Label "
            "more nodes, or lower clustering.cpus_per_actor"
        )


def reserved_cpus(config: Config, workers: int | None = None) -> float:
    """CPUs that workers (by default ``train.num_workers``) and the clustering pool reserve while they run."""
    train, clustering = config.train, config.clustering
    number = train.num_workers if workers is None else workers
    return number * train.cpus_per_worker + config.pool_actors * clustering.cpus_per_actor


@dataclass(frozen=True)
class CpuShare:
    """CPUs of the nodes where data tasks may run, and how many of them this run's data tasks can use."""

    all: float
    data: float
    shared_cluster: bool = False
    """Other runs share the cluster: data tasks are limited to ``data`` CPUs, and after losing a worker the run releases
    everything instead of waiting for a replacement. The caller starts it again."""


def whole_cluster(config: Config, nodes: Sequence[Node], workers: int | None = None) -> CpuShare:
    """The share of a run that has the cluster ``nodes`` to itself, with ``workers`` instead of ``train.num_workers``."""
    labelled = data_nodes(nodes)
    cpus = sum(node.cpus for node in labelled or nodes)
    # an estimate: workers without GPUs may be packed onto nodes labelled for data
    taken = config.pool_actors * config.clustering.cpus_per_actor if labelled else reserved_cpus(config, workers)
    return CpuShare(cpus, cpus - taken)


class DataCpus:
    """Warns once if lost machines have left no CPU for reading films: training waits for them until a machine comes back."""

    def __init__(self, config: Config, workers: int) -> None:
        self.taken, self.least = reserved_cpus(config, workers), config.data.cpus_per_task
        self._enough_at = self._looked = time.monotonic()
        self._told = False

    def look(self) -> None:
        """Call it often: it looks every few seconds."""
        now = time.monotonic()
        if self._told or now - self._looked < LOOK_S:
            return
        self._looked, cpus = now, float(ray.cluster_resources().get("CPU", 0.0))
        if cpus - self.taken >= self.least:
            self._enough_at = now
        elif now - self._enough_at >= STARVED_S:
            self._told = True
            logger.warning(
                "no CPU is left for reading films: the cluster has %g CPUs, workers and clustering hold %g of them, and a "
                "task that reads needs %g. Training waits for films; add a machine, or stop the run (Ctrl-C twice) and resume it "
                "with a smaller train.num_workers",
                cpus, self.taken, self.least,
            )  # fmt: skip


def studies_ahead(config: Config, corpus: Corpus, data_cpus: float) -> int:
    """Decoded studies that may wait for training: ``data.studies_ahead``, or enough to keep decoders and training busy."""
    data = config.data
    if data.studies_ahead is not None:
        return data.studies_ahead
    decoders = max(int(data_cpus / data.cpus_per_task), 1)
    return default_read_ahead(corpus.source, data, len(corpus.train), config.train.global_batch_size, decoders)


def threads_per_worker(config: Config, workers: int | None = None) -> int:
    """Torch threads of each worker; ``workers`` instead of ``train.num_workers``."""
    if config.train.threads_per_worker is not None:
        return config.train.threads_per_worker
    on_one_machine = min(workers or config.train.num_workers, max(os.cpu_count() or 1, 1))
    return max((os.cpu_count() or 1) // on_one_machine, 1)


class PretrainJob(Job):
    """One pretraining run."""

    script = "pretrain"
    packages = ("cmcgns", "ray", "torch", "deepspeed", "transformers", "pyarrow", "numpy")

    def __init__(self, config: Config, dry_run: bool = False) -> None:
        self.setup, self.dry_run = setup_pretraining(config), dry_run
        self.config, self.folder = self.setup.config, self.setup.folder
        # imported here: torch takes seconds to load, and wrong settings are refused before that
        from cmcgns.train.launch import count_parameters

        self.parameters = count_parameters(self.config, self.setup.tokenizer)

    def environment(self) -> dict[str, str]:
        return worker_variables(self.config)

    def uris(self) -> list[str]:
        return [self.config.data.uri, self.folder.storage]

    def needed(self) -> list[dict[str, float]]:
        return [*run_bundles(self.config), ONE_CPU]

    def modules(self) -> dict[str, str]:
        return foreign_modules(self.config.model_dump())

    def plan(self, cpus: float) -> dict[str, str]:
        nodes = list_nodes()
        share = whole_cluster(self.config, nodes, self.config.train.least_workers)
        placed = describe_placement(self.config, nodes)
        with_fewest = "" if self.config.train.min_workers is None else f" with {self.config.train.min_workers} workers"
        cluster = f"{placed}; {share.data:g} CPUs left for data{with_fewest}"
        if self._would_grow(nodes):
            cluster = f"{placed}; {describe_request(self.needed())}; the autoscaler will be asked for the rest"
        return self._describe(share) | {"cluster": cluster}

    def _would_grow(self, nodes: Sequence[Node]) -> bool:
        """True for a dry run on a cluster whose autoscaler can add what is missing."""
        return self.dry_run and can_scale_up(nodes)

    def _describe(self, share: CpuShare) -> dict[str, str]:
        setup, config, corpus, schedule = self.setup, self.config, self.setup.corpus, self.setup.schedule
        train, clustering, filtered = config.train, config.clustering, corpus.filtered
        excluded = ", ".join(f"{count} {reason}" for reason, count in filtered.items()) or "none"
        sentences = f"about {setup.prepared.sentences} training sentences" if config.data.reports else "no reports"
        workers, fewer = str(train.num_workers), ""
        if train.min_workers is not None:
            workers = " or ".join(map(str, train.numbers_of_workers))
            steps = train.global_batch_size // (train.microbatch_size * train.min_workers)
            fewer = f", or {train.min_workers} x {train.microbatch_size} x {steps}"
        threads = " + 1 GPU" if train.use_gpu else f", {threads_per_worker(config)} threads each"
        plan = {
            "run": f"{self.folder.uri}{' (resumed)' if self.folder.resumed else ''}",
            "data": f"{config.data.uri} ({corpus.source.format}): {len(corpus.train)} training, {len(corpus.valid)} "
            f"validation studies, {sentences}; films excluded: {excluded}; "
            f"studies rejected by the reader: {len(corpus.bad_rows)}; at most "
            f"{studies_ahead(config, corpus, share.data)} studies are decoded ahead of training",
            "model": f"{config.model.image_encoder} + {config.model.text_encoder}, D {config.model.embed_dim}, "
            f"{self.parameters / 1e6:.1f} M parameters, {setup.tokenizer.vocabulary_size} word pieces",
            "training": f"{workers} workers x {train.cpus_per_worker:g} CPU{threads}, "
            f"{train.engine} ZeRO-{train.zero_stage}, {train.precision}, {train.global_batch_size} studies a step = "
            f"{train.num_workers} x {train.microbatch_size} x {train.accumulation}{fewer}",
            "method": f"{config.method.name}, {' + '.join(str(length) for length in schedule.lengths if length)} steps, "
            f"warm-up {schedule.warmup}{' each' if schedule.last_stage > 1 else ''}",
        }
        if config.banks:
            several = f" {', '.join(bank.name for bank in config.banks)}" if len(config.banks) > 1 else ""
            plan["clustering"] = (
                f"{config.banks[0].num_clusters} centroids{several and f' of each of{several}'}, {clustering.actors} actors x "
                f"{clustering.cpus_per_actor:g} CPU, bank of {clustering.bank_size}, every {clustering.refresh_every} steps"
            )
        return plan

    def check_cluster(self, cpus: float) -> None:
        nodes = list_nodes()
        if not self._would_grow(nodes):
            check_cpus(self.config)
            check_data_nodes(self.config, nodes)

    def run(self, terminal: Console) -> dict[str, Any]:
        @contextmanager
        def follow(coordinator: Any) -> Iterator[None]:
            display = Display(coordinator, self.setup.schedule, run_bundles(self.config), terminal)
            try:
                with stop_on_interrupt(coordinator):
                    yield
            finally:
                display.close()

        return train(self.setup, None, follow)

    def write_result(self, result: dict[str, Any]) -> None:
        """Only for a run that ended outside ``train``, which sweeps call too and which writes its own result."""
        if "versions" not in result:
            super().write_result(result)

    def report(self, terminal: Console, result: dict[str, Any]) -> None:
        has_trained = result.get("studies_seen") and result["status"] != "failed"
        if has_trained and self.config.banks and result["clustering_started_at"] is None:
            terminal.print(f"[yellow]{no_clusters(self.config, result['steps'])}[/yellow]", highlight=False)
        super().report(terminal, result)
        if result.get("interrupted"):
            # Ray Train's thread is still waiting in Ray; a shutdown now would end the process with status 1.
            # Ray's processes end when their driver ends.
            sys.stdout.flush()
            os._exit(STATUS[result["status"]])

    def next_step(self, result: dict[str, Any]) -> str:
        if result["checkpoint"] if "checkpoint" in result else latest_checkpoint(self.folder):
            return super().next_step(result)
        if not storage.exists(self.folder.file("config.yaml")):
            return "nothing is saved, so there is nothing to resume: start the same command again"
        return f"no step is saved yet: to change settings start a new run; to begin this one again: {self.resume_command()}"

    def summary(self, result: dict[str, Any]) -> dict[str, str]:
        scores = result["metrics"]
        validation = {"loss": f"{scores['loss']:.3f} on {scores['studies']} validation studies"}
        if self.config.data.reports:
            validation = {
                "recall@1": f"{scores['i2t_recall_at_1']:.1%} film to report, {scores['t2i_recall_at_1']:.1%} report to film, "
                f"on {scores['studies']} validation studies (chance {scores['chance_recall_at_1']:.2%})"
            }
        return {
            "finished": f"{result['steps']} steps, {result['studies_seen']} studies, {result['bad_rows']} bad rows, "
            f"{result['centroids_version'] or 0} centroid versions",
            **validation,
            "export": str(result["export"]),
            "checkpoint": str(result["checkpoint"]),
            "metrics": self.folder.file("metrics.jsonl"),
            "pictures": f"tensorboard --logdir {self.folder.file('tensorboard')}",
            **self.next_commands(),
        }

    def next_commands(self) -> dict[str, str]:
        """What can be done with the finished run, a command each."""
        uri, evaluate = shlex.quote(self.folder.uri), " ".join(invocation("evaluate"))
        commands = {"report": f"cmcgns report {uri}", "evaluate": f"{evaluate} --evaluate.run={uri}"}
        if self.config.data.reports:
            index = shlex.quote(f"indexes/{self.folder.name}")
            commands["search"] = f"{' '.join(invocation('search'))} --search.run={uri} --search.index={index}"
        return commands | {"in Python": f"cmcgns.load({self.folder.uri!r})"}


def pretrain(config: Config) -> int:
    """Exit status of one pretraining run."""
    return run(PretrainJob(config))


def train(
    setup: Pretraining, cpus: CpuShare | None, follow: Callable[[Any], AbstractContextManager[None]]
) -> dict[str, Any]:
    """The content of result.json at the end of the run; ``follow`` is entered with the coordinator for the length of the run.

    ``cpus``: its share of a cluster; None if it has the cluster to itself.
    Also contains ``interrupted`` (after a second Ctrl-C), ``permanent_failure`` (a retry would fail too) and the coordinator's
    ``marks``.
    """
    from cmcgns.clustering.bank import start_pool
    from cmcgns.train.elastic import run_workers

    config, folder = setup.config, setup.folder
    write_start(folder, config, setup.corpus, setup.tokenizer)
    if folder.resumed:
        check_unchanged(setup)
        delete_half_written(folder, (), if_listed=True)  # of an attempt that was killed
        write_snapshot(folder, setup.checkpoint)
        end_last_attempt(folder, setup.checkpoint)
    known_bad = setup.corpus.bad_rows | (read_bad_rows(folder.uri) if folder.resumed else {})
    coordinator = start_coordinator(setup.corpus.studies, config.data.max_bad_fraction, known_bad)
    log_to_coordinator(coordinator)
    pool = start_pool(config.clustering) if config.banks else None
    interrupted = False
    try:
        with follow(coordinator):
            checkpoint, error = run_workers(setup, pool, coordinator, cpus)
    except KeyboardInterrupt:  # the second Ctrl-C
        checkpoint, error, interrupted = None, None, True
    finally:
        if pool is not None:
            pool.stop()
    account = read_account(coordinator, known_bad)
    if interrupted and account["outcome"] is None:
        account["outcome"] = {"finished": False, "steps": account["row"].get("step", 0)}
    if error is not None or account["failure"]:
        delete_half_written(folder, setup.there_before)
    result = conclude(folder, account, checkpoint or latest_checkpoint(folder), error)
    return result | {
        "interrupted": interrupted,
        "permanent_failure": account["failure"] is not None,
        "marks": account["marks"],
    }


def check_unchanged(setup: Pretraining) -> None:
    """Raise ``UserError`` if another job has continued the run since its checkpoints were read."""
    if tuple(list_checkpoints(setup.folder)) != setup.there_before:
        raise UserError(
            f"run.resume {setup.folder.name}: another job has continued that run in the meantime; start this command again"
        )


def worker_variables(config: Config) -> dict[str, str]:
    """Environment variables of every process of the run, in addition to those of every job."""
    start_s = NODE_START_S if os.environ.get("RAY_ADDRESS") and config.train.min_workers is None else 600
    own = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{start_s:.0f}",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if not os.environ.get("RAY_ADDRESS"):
        own["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # this machine is not preemptible
        loopback = [
            name for name, of in psutil.net_if_addrs().items() if any(each.address == "127.0.0.1" for each in of)
        ]
        own |= {"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}
    if config.train.deterministic:
        own["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts; without it cuBLAS is not deterministic
    return own if config.train.use_gpu else own | {"DS_ACCELERATOR": "cpu"}


def no_clusters(config: Config, steps: int) -> str:
    """Why the losses of a run of ``steps`` steps were those without clusters."""
    least = config.clustering.start_step + config.clustering.refresh_every
    if steps < least:
        return (
            f"clusters were not in use yet: they are from step {least} at the earliest (clustering.start_step and "
            f"refresh_every), and the run has {steps}"
        )
    return (
        "clustering never started: the losses are those without clusters. See clustering.start_cosine, start_step, refresh_every "
        f"and {config.banks[0].setting}"
    )


def conclude(
    folder: RunFolder, account: dict[str, Any], checkpoint: str | None, error: Exception | None
) -> dict[str, Any]:
    """Write result.json and bad_rows.jsonl; the content of result.json."""
    outcome = account["outcome"] or {}
    failure = account["failure"] or (error and (account["hang"] or memory_failure() or last_line(error))) or None
    status = "failed" if failure or not outcome else "finished" if outcome["finished"] else "stopped"
    scheme = "s3://" if storage.is_s3(folder.uri) else ""
    result = {
        "status": status,
        "steps": outcome.get("steps"),
        "studies_seen": outcome.get("studies_seen"),
        "bad_rows": len(account["bad_rows"]),
        "metrics": outcome.get("metrics", {}),
        "clustering_started_at": outcome.get("clustering_started_at"),
        "centroids_version": outcome.get("centroids_version"),
        "best_stage1": outcome.get("best_stage1"),
        "checkpoint": checkpoint and scheme + checkpoint.removeprefix(scheme),
        "export": outcome.get("export"),
        "failure": failure,
        "versions": {name: metadata.version(name) for name in PretrainJob.packages},
    }
    try:
        folder.write_json("result.json", result)
        write_bad_rows(folder.uri, account["bad_rows"])
    except storage.FullDiskError as full:
        return result | {"status": "failed", "failure": failure or str(full)}
    return result
