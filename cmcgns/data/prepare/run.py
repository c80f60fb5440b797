"""The driver of `jobs/prepare.py`: plans shards, has Ray Data make those that are missing, writes the manifest last."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data  # before ray_session, which quiets its log
from rich.console import Console
from rich.table import Table

from cmcgns import storage
from cmcgns.bad_rows import too_many_bad, write_bad_rows
from cmcgns.cli import STATUS_FAILED, STATUS_INTERRUPTED
from cmcgns.cluster.session import ray_session
from cmcgns.data.image import Target
from cmcgns.data.manifest import MANIFEST, PLAN, SPLITS, Manifest, joint_hash, read_manifest
from cmcgns.data.prepare.config import PrepareJobConfig
from cmcgns.data.prepare.plan import Plan, Split, arrange_splits, open_plan, refuse_another_set
from cmcgns.data.prepare.shard import MadeShard, Maker, Pseudonyms, ShardAccount, ShardPlan, find_made
from cmcgns.data.readers import Source, open_index
from cmcgns.data.record import StudyIndex
from cmcgns.errors import UserError, cause
from cmcgns.terminal import console, log_on, print_plan, quiet_terminal

READ_THREADS = 16


@dataclass
class Progress:
    """What has been made so far."""

    studies: int
    """Studies of the corpus, those included that could not be used at first sight."""
    bad_rows: dict[str, str]
    """Reason by study, or by study/film where the study has others."""
    lost: int
    """Studies that cannot be used."""
    made: dict[str, MadeShard] = field(default_factory=dict)
    retries: int = 0

    def add(self, shard: MadeShard) -> None:
        """Take a shard in."""
        self.made[shard.plan.name] = shard
        self.bad_rows |= shard.account.bad_rows
        self.lost += shard.account.lost

    def complaint(self, most: float) -> str | None:
        """What to tell the user when more than the share ``most`` of the studies is lost; else None."""
        return too_many_bad(self.lost, self.studies, most, self.bad_rows.values())


def prepare(config: PrepareJobConfig) -> int:
    """Exit status of a preparation: 0 complete, 1 failed, 130 stopped by the user; what is made stays made."""
    terminal = console()
    pseudonyms = Pseudonyms.from_file(config.prepare.pseudonymise_key_file)
    config = with_absolute_paths(config)
    out = config.prepare.out
    with log_on(terminal):
        source, index = open_index("data.uri", config.data, Target(config.prepare.image_size, "shorter"))
        refuse_useless(config, source, index)
        splits = arrange_splits(index, config.data.group_studies, pseudonyms)
        if storage.exists(storage.join(out, MANIFEST)):
            refuse_another_set(config, source, splits, pseudonyms)
            clear(out)
            return say_complete(terminal, out, "was complete already")
        plan = open_plan(config, source, splits, pseudonyms)
        progress = look_around(plan, index, out, pseudonyms)
        missing = [shard for shard in plan.shards if shard.name not in progress.made]
        print_plan(terminal, describe_plan(config, source, index, plan, missing))
        maker, began = Maker(source, config.prepare, pseudonyms), time.perf_counter()
        with quiet_terminal(), ray_session(uris=[config.data.uri, out]) as cpus:
            refuse_large_tasks(config.prepare.cpus_per_task, cpus)
            status = make_missing(terminal, config, maker, splits, missing, progress)
        if status:
            return status
        made = [progress.made[shard.name] for shard in plan.shards]
        write_manifest(out, plan, index, made, progress.bad_rows)
        clear(out)
        return say_complete(terminal, out, f"is complete after {time.perf_counter() - began:.0f} s")


def with_absolute_paths(config: PrepareJobConfig) -> PrepareJobConfig:
    """``config`` with local folders made absolute: tasks start in other folders than the driver."""
    data, settings = config.data, config.prepare
    if data.uri.split(":")[0] != "phantom":
        data = data.model_copy(update={"uri": storage.absolute("data.uri", data.uri)})
    settings = settings.model_copy(update={"out": storage.absolute("prepare.out", settings.out).rstrip("/")})
    return config.model_copy(update={"data": data, "prepare": settings})


def refuse_useless(config: PrepareJobConfig, source: Source, index: StudyIndex) -> None:
    """Refuse a corpus of which nothing could be made."""
    if source.format == "parquet":
        raise UserError(f"data.uri {config.data.uri} is a prepared set; give the raw one that it was made of")
    if not len(index.table):
        first = f", the first because {index.bad_rows[0]['reason']}" if index.bad_rows else ""
        raise UserError(
            f"data.uri {config.data.uri} has no study that could be prepared: {len(index.bad_rows)} cannot be used{first}; "
            f"{sum(index.filtered.values())} films are not of the views {', '.join(config.data.views)}"
        )


def refuse_large_tasks(cpus_per_task: float, cpus: float) -> None:
    """Refuse tasks that would wait for ever for a machine that is large enough; a cluster may still get one."""
    if cpus_per_task > cpus and not os.environ.get("RAY_ADDRESS"):
        raise UserError(
            f"prepare.cpus_per_task {cpus_per_task:g} is more than the {cpus:g} CPUs of this machine; lower it"
        )


def look_around(plan: Plan, index: StudyIndex, out: str, pseudonyms: Pseudonyms) -> Progress:
    """The shards that lie in the set already."""
    bad_rows = {pseudonyms(row["source"]): row["reason"] for row in index.bad_rows}
    progress = Progress(len(index.table) + len(index.bad_rows), bad_rows, lost=len(bad_rows))
    there = set(storage.list_files(out))
    with ThreadPoolExecutor(READ_THREADS) as threads:
        for shard in threads.map(lambda shard: find_made(shard, out), [s for s in plan.shards if s.name in there]):
            progress.add(shard)
    return progress


def make_missing(
    terminal: Console,
    config: PrepareJobConfig,
    maker: Maker,
    splits: dict[str, Split],
    missing: list[ShardPlan],
    progress: Progress,
) -> int:
    """Have every missing shard made; the exit status."""
    began, films, of = time.perf_counter(), 0, len(missing) + len(progress.made)
    try:
        for shard, retries in shards_as_made(maker, splits, missing, config.prepare.cpus_per_task):
            progress.add(shard)
            progress.retries += retries
            films += shard.account.rows
            terminal.print(
                f"shard {len(progress.made)}/{of} {shard.plan.name}: {shard.account.rows} films, "
                f"{shard.bytes / 1e6:.1f} MB; {films / (time.perf_counter() - began):.0f} films/s, "
                f"{len(progress.bad_rows)} bad rows, {progress.retries} requests tried again",
                highlight=False,
            )
            if complaint := progress.complaint(config.data.max_bad_fraction):
                return say_stopped(terminal, progress, of, complaint, STATUS_FAILED)
    except KeyboardInterrupt:
        return say_stopped(terminal, progress, of, "stopped", STATUS_INTERRUPTED)
    except Exception as error:  # whatever Ray Data wraps a task's error in
        return say_stopped(terminal, progress, of, cause(error), STATUS_FAILED)
    complaint = progress.complaint(config.data.max_bad_fraction)
    return say_stopped(terminal, progress, of, complaint, STATUS_FAILED) if complaint else 0


def say_stopped(terminal: Console, progress: Progress, of: int, reason: str, status: int) -> int:
    """Tell why the set is not complete; ``status``."""
    terminal.print(reason, style="red", highlight=False, markup=False)
    terminal.print(
        f"{len(progress.made)} of {of} shards are made and stay as they are; the same command goes on with the others"
    )
    return status


def shards_as_made(
    maker: Maker, splits: dict[str, Split], missing: list[ShardPlan], cpus_per_task: float
) -> Iterator[tuple[MadeShard, int]]:
    """Each missing shard once it is committed, in whatever order, and how many requests were tried again for it."""
    if not missing:
        return
    with task_context():
        rows = ray.data.range(len(missing), override_num_blocks=len(missing)).map_batches(
            make_shards,
            batch_format="pyarrow",
            num_cpus=cpus_per_task,
            fn_kwargs={"maker": maker, "splits": ray.put(splits), "plans": missing},
        )
        for row in rows.iter_rows():
            if row["failure"]:
                raise UserError(row["failure"])
            account = ShardAccount.from_json(row["account"])
            yield MadeShard(missing[row["number"]], account, row["bytes"]), row["retries"]


def make_shards(numbers: pa.Table, maker: Maker, splits: Any, plans: Sequence[ShardPlan]) -> pa.Table:
    """A Ray Data task: the shards whose numbers come in are made, their accounts go out.

    What would end every other task too goes out as a row: of what is raised Ray Data leaves a traceback.
    """
    held: dict[str, Split] = ray.get(splits)
    rows = []
    for number in numbers["id"].to_pylist():
        plan, before = plans[number], storage.retries()
        row = {"number": number, "bytes": 0, "account": "", "failure": ""}
        try:
            shard = maker.write(plan, map(held[plan.split].group, range(plan.first_group, plan.end_group)))
            row |= {"bytes": shard.bytes, "account": shard.account.to_json()}
        except UserError as error:
            row["failure"] = str(error)
        rows.append(row | {"retries": storage.retries() - before})
    return pa.Table.from_pylist(rows)


def task_context() -> AbstractContextManager[Any]:
    """Ray Data's settings for tasks of minutes whose results are small."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_no_progress_timeout_s = -1  # a shard may take longer than any guard
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    current: AbstractContextManager[Any] = ray.data.DataContext.current(context)
    return current


def write_manifest(out: str, plan: Plan, index: StudyIndex, made: list[MadeShard], bad_rows: dict[str, str]) -> None:
    """bad_rows.jsonl, then the manifest, which makes the set complete."""
    write_bad_rows(out, bad_rows)
    shards = [each.entry() for each in made]
    manifest = Manifest(
        rows=sum(shard.rows for shard in shards),
        studies=sum(shard.studies for shard in shards),
        content_hash=joint_hash(group.content_hash for shard in shards for group in shard.row_groups),
        groups=plan.groups,
        shards=shards,
        source=plan.source,
        settings=plan.settings,
        bad_rows=len(bad_rows),
        filtered=index.filtered,
        summary=summarise(made, bad_rows),
    )
    storage.write_bytes(storage.join(out, MANIFEST), manifest.to_json().encode())


def clear(out: str) -> None:
    """Take away what only an incomplete set needs."""
    storage.delete_file(storage.join(out, PLAN))
    storage.clear_leftovers(out)


def describe_plan(
    config: PrepareJobConfig, source: Source, index: StudyIndex, plan: Plan, missing: list[ShardPlan]
) -> dict[str, str]:
    """What is about to happen, for the user to read before it does."""
    films = pc.sum(pc.list_value_length(index.table["films"])).as_py()
    left_out = ", ".join(f"{count} {reason}" for reason, count in index.filtered.items()) or "none"
    settings = config.prepare
    encoding = "PNG" if settings.encoding == "png" else f"JPEG of quality {settings.quality}"
    return {
        "data": f"{source.uri} ({source.format}): {len(index.table)} studies, {films} films; films left out: {left_out}; "
        f"unusable at first sight: {len(index.bad_rows)}",
        "films": f"shorter side {settings.image_size} pixels, {encoding}"
        f"{', black borders cut away' if config.data.crop_borders else ''}",
        "ids": "as they are" if settings.pseudonymise_key_file is None else "hashes keyed with pseudonymise_key_file",
        "out": f"{settings.out}: {len(plan.shards)} shards, {len(plan.shards) - len(missing)} of them made already",
    }


def say_complete(terminal: Console, out: str, how: str) -> int:
    """Show what the set holds; exit status 0."""
    manifest = read_manifest(out)
    terminal.print(summary_table(manifest))
    terminal.print(
        f"{out} {how}: {manifest.rows} films of {manifest.studies} studies, {manifest.bad_rows} bad rows; "
        f"content hash {manifest.content_hash}\nuse it with --data.uri={out} --data.format=parquet",
        highlight=False,
    )
    return 0


QUANTILES = (0.05, 0.5, 0.95)
COUNTED = ("views", "sentences", "words", "sides")


def summarise(made: Sequence[MadeShard], bad_rows: Mapping[str, str]) -> dict[str, Any]:
    """Counts of each split and of the whole set; reasons of bad rows by how often they occur."""
    return {
        "splits": {split: _of([shard for shard in made if shard.plan.split == split]) for split in SPLITS},
        "dropped": dict(Counter(bad_rows.values()).most_common()),
    }


def _of(made: Sequence[MadeShard]) -> dict[str, Any]:
    counters: dict[str, Counter[Any]] = {name: Counter() for name in COUNTED}
    for shard in made:
        for name, counter in counters.items():
            counter.update(getattr(shard.account, name))
    lengths = {name: _quantiles(counters[name]) for name in ("sentences", "words", "sides")}
    return {
        "rows": sum(shard.account.rows for shard in made),
        "studies": sum(shard.entry().studies for shard in made),
        "bytes": sum(shard.bytes for shard in made),
        "views": {view or "unknown": count for view, count in sorted(counters["views"].items())},
        **lengths,
    }


def _quantiles(counts: Counter[int]) -> list[int]:
    """5 %, median and 95 % of values given by how often each occurs."""
    if not counts:
        return []
    values = np.array(sorted(counts))
    shares = np.cumsum([counts[int(value)] for value in values]) / counts.total()
    return [int(values[np.searchsorted(shares, quantile)]) for quantile in QUANTILES]


def summary_table(manifest: Manifest) -> Table:
    """The summary for the terminal; lengths as 5 % / median / 95 %."""
    table = Table(box=None, pad_edge=False)
    for heading in ("split", "studies", "films", "MB", "views", "sentences", "words", "longer side"):
        table.add_column(heading, justify="left" if heading in ("split", "views") else "right")
    for split, facts in manifest.summary["splits"].items():
        table.add_row(
            split,
            str(facts["studies"]),
            str(facts["rows"]),
            f"{facts['bytes'] / 1e6:.1f}",
            ", ".join(f"{count} {view}" for view, count in facts["views"].items()),
            *(" / ".join(map(str, facts[name])) for name in ("sentences", "words", "sides")),
        )
    for kind, reasons in (("left out", manifest.filtered), ("bad", manifest.summary["dropped"])):
        for reason, count in reasons.items():
            table.add_row(kind, "", str(count), "", reason)
    return table
