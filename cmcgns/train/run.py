"""The driver of a pretraining run: checks, plan, workers and pool, and the run's last word."""

import os
import sys
from importlib import metadata
from typing import Any

import ray
from rich.console import Console

from cmcgns.clustering.kmeans import check_faiss
from cmcgns.command_line import STATUS_FAILED, STATUS_INTERRUPTED
from cmcgns.config import Config
from cmcgns.data import storage
from cmcgns.errors import last_line
from cmcgns.run_folder import RunFolder, open_folder, refuse_changes, warn_of_passing_folder
from cmcgns.session import ray_session
from cmcgns.terminal import console, print_plan, quiet_terminal
from cmcgns.train.board import log_to_board, start_board
from cmcgns.train.corpus import check_sizes, make_tokenizer, open_corpus, sample_reports
from cmcgns.train.display import Display
from cmcgns.train.folder import (
    FREE_TO_CHANGE,
    latest_checkpoint,
    read_bad_rows,
    read_tokenizer,
    with_absolute_paths,
    write_bad_rows,
    write_start,
)
from cmcgns.train.plan import check_cpus, describe_plan
from cmcgns.train.schedule import build_schedule

PACKAGES = ("cmcgns", "ray", "torch", "deepspeed", "transformers", "pyarrow", "numpy")


def pretrain(config: Config) -> int:
    """Exit status of one pretraining run: 0 finished, 1 failed, 130 stopped by the user with everything saved."""
    terminal, config = console(), with_absolute_paths(config)
    check_faiss(config.clustering.device)
    folder = open_folder(config.run, "pretrain")
    if folder.resumed:
        refuse_changes(config, folder, FREE_TO_CHANGE)
    corpus = open_corpus(config)
    schedule = build_schedule(config.train, len(corpus.train))
    sample = sample_reports(corpus, config.model.vocabulary_reports)
    check_sizes(config, corpus, sample)
    tokenizer = read_tokenizer(folder, config) if folder.resumed else make_tokenizer(config, sample)
    # only now, see ``launch``
    from cmcgns.clustering.bank_pool import start_pool
    from cmcgns.train.launch import assign, count_parameters, fit

    parameters = count_parameters(config, tokenizer)
    with quiet_terminal(), ray_session(worker_variables(config)) as cpus:
        check_cpus(config, cpus)
        print_plan(
            terminal, describe_plan(config, folder, corpus, schedule, sample.sentences, tokenizer, parameters, cpus)
        )
        warn_of_passing_folder(terminal, folder)
        write_start(folder, config, corpus.digest, tokenizer)
        known_bad = corpus.bad_rows | (read_bad_rows(folder.uri) if folder.resumed else {})
        board = start_board(corpus.studies, config.data.max_bad_fraction, known_bad)
        log_to_board(board)
        pool = start_pool(config.clustering, config.train.num_workers, board)
        display = Display(board, schedule, terminal)
        gave_up = False
        try:
            checkpoint, error = fit(
                config, folder, assign(config, folder, corpus, schedule, tokenizer, pool, board, cpus), board
            )
        except KeyboardInterrupt:  # the second one
            checkpoint, error, gave_up = None, None, True
        finally:
            display.close()
            pool.stop()
        account = ray.get(board.account.remote())
        if gave_up and account["outcome"] is None:
            account["outcome"] = {"finished": False, "steps": account["row"].get("step", 0)}
        status = conclude(terminal, folder, account, checkpoint or latest_checkpoint(folder), error)
        if gave_up:
            # Ray Train's thread still waits in Ray, which answers a shutdown under it by ending the process with
            # status 1. Ray's processes end with their driver.
            sys.stdout.flush()
            os._exit(status)
        return status


def worker_variables(config: Config) -> dict[str, str]:
    """Environment variables of every process of the run, beside those of every job."""
    own = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if not os.environ.get("RAY_ADDRESS"):
        own["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody takes this machine away with a notice
    return own if config.train.use_gpu else own | {"DS_ACCELERATOR": "cpu"}


def conclude(
    terminal: Console, folder: RunFolder, account: dict[str, Any], checkpoint: str | None, error: Exception | None
) -> int:
    """Write result.json and bad_rows.jsonl, say where everything is; the exit status."""
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
    report(terminal, folder, result)
    return {"finished": 0, "stopped": STATUS_INTERRUPTED}.get(status, STATUS_FAILED)


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
