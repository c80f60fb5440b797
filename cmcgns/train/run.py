"""The driver of a pretraining run: checks, plan, workers and pool, and the run's last word."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from typing import Any

import ray
from rich.console import Console

from cmcgns.command_line import STATUS_FAILED, STATUS_INTERRUPTED
from cmcgns.config import Config
from cmcgns.data import storage
from cmcgns.errors import last_line
from cmcgns.placement import MACHINES_S, describe_placement, held_bundles, machines, may_grow, needs
from cmcgns.run_folder import RunFolder, warn_of_passing_folder
from cmcgns.session import ONE_CPU, ray_session
from cmcgns.terminal import console, print_plan, quiet_terminal
from cmcgns.train.board import log_to_board, start_board
from cmcgns.train.display import Display, stop_on_interrupt
from cmcgns.train.folder import latest_checkpoint, read_bad_rows, write_bad_rows, write_start
from cmcgns.train.opened import Pretraining, open_pretraining
from cmcgns.train.plan import Share, check_cpus, check_data_nodes, describe_plan, whole_cluster

PACKAGES = ("cmcgns", "ray", "torch", "deepspeed", "transformers", "pyarrow", "numpy")


def pretrain(config: Config, dry_run: bool = False) -> int:
    """Exit status of one pretraining run: 0 finished, 1 failed, 130 stopped by the user with everything saved.

    A ``dry_run`` ends with the plan, or with what is missing for it; it writes nothing, and asks an autoscaler for nothing.
    """
    terminal, run = console(), open_pretraining(config)
    from cmcgns.train.launch import count_parameters  # only now, see ``launch``

    parameters = count_parameters(run.config, run.tokenizer)
    uris = [run.config.data.uri, run.folder.storage]
    needed = [*held_bundles(config), ONE_CPU]
    with quiet_terminal(), ray_session(worker_variables(config), uris, [] if dry_run else needed):
        nodes = machines()
        plan = describe_plan(run, parameters, nodes)
        if dry_run and may_grow(nodes):
            plan["cluster"] = (
                f"{describe_placement(config, nodes)}; {needs(needed)}; its autoscaler is asked for the rest"
            )
            print_plan(terminal, plan)
            return 0
        print_plan(terminal, plan)
        check_cpus(config)
        check_data_nodes(config, nodes)
        warn_of_passing_folder(terminal, run.folder)
        if dry_run:
            return 0

        @contextmanager
        def follow(board: Any) -> Iterator[None]:
            display = Display(board, run.schedule, terminal)
            try:
                with stop_on_interrupt(board):
                    yield
            finally:
                display.close()

        result = train(run, whole_cluster(config, nodes), follow)
        report(terminal, run.folder, result)
        status = {"finished": 0, "stopped": STATUS_INTERRUPTED}.get(result["status"], STATUS_FAILED)
        if result["gave_up"]:
            # Ray Train's thread still waits in Ray, which answers a shutdown under it by ending the process with
            # status 1. Ray's processes end with their driver.
            sys.stdout.flush()
            os._exit(status)
        return status


def train(run: Pretraining, cpus: Share, follow: Callable[[Any], AbstractContextManager[None]]) -> dict[str, Any]:
    """What result.json says of the run, once it has come to its end; ``follow`` is given the board while it lasts.

    Beside it: ``gave_up`` after a second Ctrl-C, ``hopeless`` where another attempt would end as this one, and the ``marks``
    of the board.
    """
    from cmcgns.clustering.bank_pool import start_pool
    from cmcgns.train.launch import assign, fit

    config, folder = run.config, run.folder
    write_start(folder, config, run.corpus.digest, run.tokenizer)
    known_bad = run.corpus.bad_rows | (read_bad_rows(folder.uri) if folder.resumed else {})
    board = start_board(run.corpus.studies, config.data.max_bad_fraction, known_bad)
    log_to_board(board)
    pool = start_pool(config.clustering, config.train.num_workers, board)
    gave_up = False
    try:
        with follow(board):
            checkpoint, error = fit(config, folder, assign(run, pool, board, cpus), cpus.beside_others)
    except KeyboardInterrupt:  # the second one
        checkpoint, error, gave_up = None, None, True
    finally:
        pool.stop()
    account = ray.get(board.account.remote())
    if gave_up and account["outcome"] is None:
        account["outcome"] = {"finished": False, "steps": account["row"].get("step", 0)}
    result = conclude(folder, account, checkpoint or latest_checkpoint(folder), error)
    return result | {"gave_up": gave_up, "hopeless": account["failure"] is not None, "marks": account["marks"]}


def worker_variables(config: Config) -> dict[str, str]:
    """Environment variables of every process of the run, beside those of every job."""
    own = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{MACHINES_S:.0f}" if os.environ.get("RAY_ADDRESS") else "600",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if not os.environ.get("RAY_ADDRESS"):
        own["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody takes this machine away with a notice
    return own if config.train.use_gpu else own | {"DS_ACCELERATOR": "cpu"}


def conclude(
    folder: RunFolder, account: dict[str, Any], checkpoint: str | None, error: Exception | None
) -> dict[str, Any]:
    """What went into result.json; writes bad_rows.jsonl too."""
    outcome = account["outcome"] or {}
    failure = account["failure"] or (last_line(error) if error else None)
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
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    folder.write_json("result.json", result)
    write_bad_rows(folder.uri, account["bad_rows"])
    return result


def report(terminal: Console, folder: RunFolder, result: dict[str, Any]) -> None:
    """The run's last lines."""
    again = f"python jobs/pretrain.py --run.storage={folder.storage} --run.resume={folder.name}"
    if result["status"] == "failed":
        terminal.print(f"[red]failed[/red]: {result['failure']}", highlight=False)
        terminal.print(f"go on from the last checkpoint with: {again}", highlight=False)
        return
    if result["clustering_started_at"] is None:
        terminal.print(
            "[yellow]clustering never started[/yellow]: the losses are plain InfoNCE. See clustering.start_cosine, "
            "refresh_every and objective.num_clusters",
            highlight=False,
        )
    if result["status"] == "stopped":
        terminal.print(
            f"stopped after step {result['steps']}; go on from the last checkpoint with: {again}", highlight=False
        )
        return
    scores = result["metrics"]
    print_plan(
        terminal,
        {
            "finished": f"{result['steps']} steps, {result['studies_seen']} studies, {result['bad_rows']} bad rows, "
            f"{result['centroids_version']} centroid versions",
            "recall@1": f"{scores['i2t_recall_at_1']:.1%} film to report, {scores['t2i_recall_at_1']:.1%} report to film "
            f"of {scores['studies']} unseen studies (chance {scores['chance_recall_at_1']:.2%})",
            "export": str(result["export"]),
            "checkpoint": str(result["checkpoint"]),
            "metrics": folder.file("metrics.jsonl"),
            "pictures": f"tensorboard --logdir {folder.file('tensorboard')}",
        },
    )
