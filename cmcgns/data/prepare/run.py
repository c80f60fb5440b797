"""The driver of `jobs/prepare.py`: plans the shards, makes the missing ones with Ray Data, writes the manifest last."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data  # before ray_session, which silences its log
from rich.console import Console

from cmcgns import storage
from cmcgns.bad_rows import too_many_bad, write_bad_rows
from cmcgns.data.image import Target
from cmcgns.data.manifest import MANIFEST, PLAN, Manifest, joint_hash, read_manifest, write_shards
from cmcgns.data.prepare.config import PrepareJobConfig
from cmcgns.data.prepare.plan import Plan, Split, arrange_splits, check_complete_set, open_plan
from cmcgns.data.prepare.shard import MadeShard, Maker, Pseudonyms, ShardAccount, ShardPlan, read_made
from cmcgns.data.prepare.summary import Summary, summary_table
from cmcgns.data.readers import Source, open_index
from cmcgns.data.record import StudyIndex
from cmcgns.errors import UserError
from cmcgns.job import Job, run
from cmcgns.lease import hold
from cmcgns.plugins import absolute_plugin
from cmcgns.run_folder import RunFolder
from cmcgns.storage.ahead import map_ahead
from cmcgns.terminal import console

READ_THREADS = 16


class TooManyBadRowsError(RuntimeError):
    """More studies cannot be used than ``data.max_bad_fraction`` allows."""


class ShardFailedError(RuntimeError):
    """A task could not make its shard."""


@dataclass
class Progress:
    """The shards made so far."""

    studies: int
    """Studies of the corpus, including those that the reader rejected."""
    bad_rows: dict[str, str]
    """Reason by study, or by study/film if other films of the study can be used."""
    lost: int
    """Studies that cannot be used."""
    made: set[str] = field(default_factory=set)
    """Names; what is in the shards stays in their footers."""
    retries: int = 0

    def add(self, shard: MadeShard) -> None:
        """Add a finished shard."""
        self.made.add(shard.plan.name)
        self.bad_rows |= shard.account.bad_rows
        self.lost += shard.account.lost

    def check_lost(self, most: float) -> None:
        """Raise if more than the share ``most`` of the studies is lost."""
        reason = too_many_bad(self.lost, self.studies, most, self.bad_rows.values())
        if reason is not None:
            raise TooManyBadRowsError(reason)


class PrepareJob(Job):
    """A raw corpus made into shards, resumable shard by shard."""

    script = "prepare"
    resume_key = ""

    def __init__(self, config: PrepareJobConfig) -> None:
        self.pseudonyms = Pseudonyms.from_file(config.prepare.pseudonymise_key_file)
        self.config = config = with_absolute_paths(config)
        self.out = config.prepare.out
        self.folder = RunFolder(*self.out.rpartition("/")[::2], resumed=False)
        self.source, self.index = open_index("data.uri", config.data, Target(config.prepare.image_size, "shorter"))
        check_corpus(config, self.source, self.index)
        self.splits = arrange_splits(self.index, config.data.group_studies, self.pseudonyms)
        self.began = time.perf_counter()

    def is_complete(self) -> bool:
        """Whether the set exists, made from this corpus with these settings; another set at its place is refused."""
        if not storage.exists(storage.join(self.out, MANIFEST)):
            return False
        check_complete_set(self.config, self.source, self.splits, self.pseudonyms)
        clear(self.out)
        return True

    def open(self) -> None:
        """Read or write the plan of the shards, and find those that exist."""
        self.shards = open_plan(self.config, self.source, self.splits, self.pseudonyms)
        self.progress = read_progress(self.shards, self.index, self.out, self.pseudonyms)
        self.missing = [shard for shard in self.shards.shards if shard.name not in self.progress.made]

    def uris(self) -> list[str]:
        return [self.config.data.uri, self.out]

    def plan(self, cpus: float) -> dict[str, str]:
        index, settings, data = self.index, self.config.prepare, self.config.data
        films = pc.sum(pc.list_value_length(index.table["films"])).as_py()
        excluded = ", ".join(f"{count} {reason}" for reason, count in index.filtered.items()) or "none"
        encoding = "PNG" if settings.encoding == "png" else f"JPEG of quality {settings.quality}"
        total = len(self.shards.shards)
        reports = "none is read" if not data.reports else "text unchanged, with any names and dates in it"
        if settings.scrub_reports:
            reports = "dates, long numbers, names after titles and addresses removed; other names stay"
        return {
            "data": f"{self.source.uri} ({self.source.format}): {len(index.table)} studies, {films} films; films excluded: "
            f"{excluded}; studies rejected by the reader: {len(index.bad_rows)}",
            "films": f"shorter side {settings.image_size} pixels, {encoding}"
            f"{', black borders cropped' if data.crop_borders else ''}",
            "ids": "unchanged" if settings.pseudonymise_key_file is None else "hashes keyed with pseudonymise_key_file",
            "reports": reports,
            "out": f"{settings.out}: {total} shards, {total - len(self.missing)} of them already finished",
        }

    def check_cluster(self, cpus: float) -> None:
        check_task_size(self.config.prepare.cpus_per_task, cpus)

    def run(self, terminal: Console) -> dict[str, Any]:
        maker = Maker(self.source, self.config.prepare, self.pseudonyms, self.config.data.reports)
        make_missing(terminal, self.config, maker, self.splits, self.missing, self.progress)
        write_manifest(self.out, self.shards, self.index, self.progress.bad_rows)
        clear(self.out)
        return {}

    def write_result(self, result: dict[str, Any]) -> None:
        """Nothing: the manifest makes the set complete."""

    def report(self, terminal: Console, result: dict[str, Any]) -> None:
        if result["status"] == "finished":
            report_complete(terminal, self.out, f"is complete after {time.perf_counter() - self.began:.0f} s")
            return
        super().report(terminal, result)
        terminal.print(
            f"{len(self.progress.made)} of {len(self.shards.shards)} shards are finished and kept; run the same command again "
            "to make the others",
            highlight=False,
        )

    def summary(self, result: dict[str, Any]) -> dict[str, str]:
        return {"set": self.out}


def prepare(config: PrepareJobConfig) -> int:
    """Exit status of a preparation: 0 complete, 1 failed, 130 stopped by the user. Finished shards are kept."""
    job = PrepareJob(config)
    with hold(job.out, f"prepare.out {job.out}"):
        if job.is_complete():
            report_complete(console(), job.out, "was already complete")
            return 0
        job.open()
        return run(job)


def with_absolute_paths(config: PrepareJobConfig) -> PrepareJobConfig:
    """``config`` with absolute local folders: tasks start in other folders than the driver."""
    data, settings = config.data, config.prepare
    if data.uri.split(":")[0] != "phantom":
        data = data.model_copy(update={"uri": storage.absolute("data.uri", data.uri)})
    data = data.model_copy(update={"format": absolute_plugin(data.format)})
    settings = settings.model_copy(update={"out": storage.absolute("prepare.out", settings.out).rstrip("/")})
    return config.model_copy(update={"data": data, "prepare": settings})


def check_corpus(config: PrepareJobConfig, source: Source, index: StudyIndex) -> None:
    """Raise if the corpus is already prepared or has no usable study."""
    if source.format == "parquet":
        raise UserError(f"data.uri {config.data.uri} is already a prepared set; give the raw corpus")
    if not len(index.table):
        first = f", the first because {index.bad_rows[0]['reason']}" if index.bad_rows else ""
        raise UserError(
            f"data.uri {config.data.uri} has no usable study: {len(index.bad_rows)} cannot be used{first}; "
            f"{sum(index.filtered.values())} films are not of the views {', '.join(config.data.views)} (data.views)"
        )


def check_task_size(cpus_per_task: float, cpus: float) -> None:
    """Raise if tasks need more CPUs than this machine has and would never start; a cluster may still add a machine."""
    if cpus_per_task > cpus and not os.environ.get("RAY_ADDRESS"):
        raise UserError(
            f"prepare.cpus_per_task {cpus_per_task:g} is more than the {cpus:g} CPUs of this machine; lower it"
        )


def read_progress(plan: Plan, index: StudyIndex, out: str, pseudonyms: Pseudonyms) -> Progress:
    """The shards that already exist."""
    bad_rows = {pseudonyms(row["source"]): row["reason"] for row in index.bad_rows}
    progress = Progress(len(index.table) + len(index.bad_rows), bad_rows, lost=len(bad_rows))
    existing = set(storage.list_files(out))
    for shard in read_all_made([shard for shard in plan.shards if shard.name in existing], out):
        progress.add(shard)
    return progress


def read_all_made(plans: Sequence[ShardPlan], out: str) -> Iterator[MadeShard]:
    """The existing shards of ``plans``, in order."""
    return map_ahead(partial(read_made, out=out), plans, READ_THREADS)


def make_missing(
    terminal: Console,
    config: PrepareJobConfig,
    maker: Maker,
    splits: dict[str, Split],
    missing: list[ShardPlan],
    progress: Progress,
) -> None:
    """Make every missing shard.

    Raises:
        TooManyBadRowsError: more studies are lost than ``data.max_bad_fraction`` allows.
    """
    began, films, total = time.perf_counter(), 0, len(missing) + len(progress.made)
    for shard, retries in shards_as_made(maker, splits, missing, config.prepare.cpus_per_task):
        progress.add(shard)
        progress.retries += retries
        films += shard.account.rows
        terminal.print(
            f"shard {len(progress.made)}/{total} {shard.plan.name}: {shard.account.rows} films, "
            f"{shard.bytes / 1e6:.1f} MB; {films / (time.perf_counter() - began):.0f} films/s, "
            f"{len(progress.bad_rows)} bad rows, {progress.retries} requests retried",
            highlight=False,
        )
        progress.check_lost(config.data.max_bad_fraction)
    progress.check_lost(config.data.max_bad_fraction)


def shards_as_made(
    maker: Maker, splits: dict[str, Split], missing: list[ShardPlan], cpus_per_task: float
) -> Iterator[tuple[MadeShard, int]]:
    """Each missing shard when it is committed, in any order, and its number of retried requests."""
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
                raise ShardFailedError(row["failure"])
            account = ShardAccount.from_json(row["account"])
            yield MadeShard(missing[row["number"]], account, row["bytes"]), row["retries"]


def make_shards(numbers: pa.Table, maker: Maker, splits: Any, plans: Sequence[ShardPlan]) -> pa.Table:
    """A Ray Data task: makes the shards of these ``numbers`` and returns their accounts.

    A ``UserError`` is returned as a row, because Ray Data would turn it into a traceback.
    """
    split_of: dict[str, Split] = ray.get(splits)
    rows = []
    for number in numbers["id"].to_pylist():
        plan, before = plans[number], storage.retries()
        row = {"number": number, "bytes": 0, "account": "", "failure": ""}
        try:
            shard = maker.write(plan, map(split_of[plan.split].group, range(plan.first_group, plan.end_group)))
            row |= {"bytes": shard.bytes, "account": shard.account.to_json()}
        except UserError as error:
            row["failure"] = str(error)
        rows.append(row | {"retries": storage.retries() - before})
    return pa.Table.from_pylist(rows)


def task_context(in_order: bool = False) -> AbstractContextManager[Any]:
    """Ray Data's settings for tasks that take minutes and return little; ``in_order``: the results, in the order of the tasks."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = in_order
    context.execution_no_progress_timeout_s = -1  # a shard may take longer than any timeout
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    current: AbstractContextManager[Any] = ray.data.DataContext.current(context)
    return current


def write_manifest(out: str, plan: Plan, index: StudyIndex, bad_rows: dict[str, str]) -> None:
    """bad_rows.jsonl, then the manifest, which makes the set complete."""
    write_bad_rows(out, bad_rows)
    summary = Summary()
    shards = write_shards(out, map(summary.add, read_all_made(plan.shards, out)), len(plan.shards))
    manifest = Manifest(
        rows=summary.total("rows"),
        studies=summary.total("studies"),
        content_hash=joint_hash(summary.hashes),
        groups=plan.groups,
        shards=shards,
        source=plan.source,
        settings=plan.settings,
        bad_rows=len(bad_rows),
        filtered=index.filtered,
        summary=summary.as_json(bad_rows, index.repaired),
    )
    storage.write_bytes(storage.join(out, MANIFEST), manifest.to_json().encode())


def clear(out: str) -> None:
    """Delete the files that only an incomplete set needs."""
    storage.delete_file(storage.join(out, PLAN))
    storage.clear_leftovers(out)


def report_complete(terminal: Console, out: str, how: str) -> None:
    """Print the content of the set."""
    manifest = read_manifest(out)
    terminal.print(summary_table(manifest))
    alone = "" if manifest.has_reports else " --data.reports=false"
    terminal.print(
        f"{out} {how}: {manifest.rows} films of {manifest.studies} studies, {manifest.bad_rows} bad rows; "
        f"content hash {manifest.content_hash}\nuse it with --data.uri={out} --data.format=parquet{alone}",
        highlight=False,
    )
